//! The local limit: how much memory the program uses, and how much it may.

use farmem_region::Nanos;
use farmem_vmem::Residents;

use crate::memory::bytes_of;

/// Speed at which a program is assumed to touch new memory natively, in bytes a microsecond
/// (8 GB/s): the size is read again before it could have grown past the limit.
const GROWTH_BYTES_PER_MICRO: u64 = 8_000;
/// The size is read at most this often.
const PERIOD_MIN_MICROS: u64 = 500;
/// And at least this often.
const PERIOD_MAX_MICROS: u64 = 50_000;
/// And at least this often where the limit is near, though the program hardly runs: a turn costs 20 us or more.
/// One that begins to run may touch 32 MiB until then at the speed above, far less at one that is seen.
const PERIOD_QUIET_MICROS: u64 = 4_000;
/// A program hardly runs if its threads together run for less than this share of so long a time: five ticks of
/// most kernels, for the time that a thread of another process has run is known up to the last tick of its
/// processor.
const QUIET_SHARE: u64 = 32;
const QUIET_NANOS: u64 = 20_000_000;
/// Changes of our own after which the size is read again, in pages.
const CHANGES_MAX: usize = 1024;

/// What a program may have beside memory that cannot be moved out and exceeds the limit by itself:
/// 4 MiB, twice what is kept in frames for fetches. With less it would wait at every step.
const MOVABLE_MIN: usize = 1024;
/// However much is there that is never adopted (what a program has written to private mappings of
/// files, generated code, stacks), half of the limit is left to what is, up to these 16 MiB: a JVM with
/// 13 MiB of the former would have to do with 1 MiB otherwise.
const ADOPTED_LEAST_MAX: usize = 4096;
/// Pooled frames kept for fetches, a 64th of the limit, at most: 2 MiB.
const POOLED_MAX: usize = 512;
/// And at least: a request's worth.
const POOLED_MIN: usize = 64;
/// How long that memory is believed to be there, until eviction has to find it out anew.
const UNMOVABLE_MICROS: u64 = 100_000;
/// What is adopted is counted at most this often to see how much is not: small memories of which nothing
/// moves have their rounds one after the other.
const COUNT_MICROS: u64 = 2_000;

/// Measured and estimated use against the limit. In pages.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: usize,
    estimate: usize,
    measured: Residents,
    changes: usize,
    next_reading: Nanos,
    /// An earlier time, and how long the program had run by then, if that is known.
    earlier: (Nanos, Option<Nanos>),
    /// How long not to read again, as the program hardly runs.
    quiet_micros: u64,
    unexplained: usize,
    /// What cannot be moved out (locked, shared since a fork, paged by the program itself) if that is
    /// more than the limit allows, or zero.
    unmovable: usize,
    unmovable_until: Nanos,
    /// Pages of adopted ranges seen in this round of the clock hand.
    seen: usize,
    /// What is not adopted if that leaves less than [`Budget::adopted_least`], or zero.
    unadopted: usize,
    unadopted_until: Nanos,
    next_count: Nanos,
}

impl Budget {
    /// For a limit in bytes.
    #[must_use]
    pub(crate) fn new(limit_bytes: u64) -> Self {
        let limit = usize::try_from(limit_bytes >> 12).unwrap_or(usize::MAX);
        Self {
            limit,
            estimate: 0,
            measured: Residents::default(),
            changes: 0,
            next_reading: Nanos::new(0),
            earlier: (Nanos::new(0), None),
            quiet_micros: 0,
            unexplained: 0,
            unmovable: 0,
            unmovable_until: Nanos::new(0),
            seen: 0,
            unadopted: 0,
            unadopted_until: Nanos::new(0),
            next_count: Nanos::new(0),
        }
    }

    /// Nothing can be moved out, though use is above the limit: what is there is borne for a while,
    /// with a little more, or a program that has locked more than its limit would hardly move.
    pub(crate) fn bear(&mut self, now: Nanos) {
        if self.unmovable == 0 {
            self.unmovable = self.estimate;
            self.unmovable_until = now.plus_micros(UNMOVABLE_MICROS);
        }
    }

    /// The clock hand has seen so many resident pages of adopted ranges.
    pub(crate) const fn saw(&mut self, pages: usize) {
        self.seen += pages;
    }

    /// What is not adopted of what is used, if so many pages of adopted ranges and frames are there.
    fn unadopted_beside(&self, here: usize) -> usize {
        let unadopted = self.estimate.saturating_sub(here);
        if unadopted + self.adopted_least() > self.limit { unadopted } else { 0 }
    }

    /// The hand has passed over all adopted ranges; `frames` have memory. Whether what it saw leaves so much
    /// unexplained that [`Budget::unadopted`] matters, and was not counted just now. What was brought in
    /// behind the hand it has not seen: to be sure, count, and tell [`Budget::counted`].
    pub(crate) fn round_ended(&mut self, now: Nanos, frames: usize) -> bool {
        let seen = std::mem::take(&mut self.seen);
        let seems = self.unadopted_beside(seen + frames);
        if seems == 0 {
            self.unadopted = 0;
        }
        seems > 0 && now >= self.next_count
    }

    /// So many pages of adopted ranges and frames are there.
    pub(crate) fn counted(&mut self, now: Nanos, here: usize) {
        self.unadopted = self.unadopted_beside(here);
        self.unadopted_until = now.plus_micros(UNMOVABLE_MICROS);
        self.next_count = now.plus_micros(COUNT_MICROS);
    }

    /// What adopted memory and frames may have in any case.
    fn adopted_least(&self) -> usize {
        (self.limit / 2).min(ADOPTED_LEAST_MAX)
    }

    /// The limit, or what is borne above it.
    fn borne(&self) -> usize {
        let beside = |pages: usize, more: usize| if pages == 0 { 0 } else { pages + more };
        let unmovable = beside(self.unmovable, MOVABLE_MIN);
        self.limit.max(unmovable).max(beside(self.unadopted, self.adopted_least()))
    }

    /// Another limit.
    pub(crate) fn set_limit(&mut self, limit_bytes: u64) {
        self.limit = usize::try_from(limit_bytes >> 12).unwrap_or(usize::MAX);
    }

    /// Where use is held: a little below the limit, because new mappings grow unseen between two
    /// readings.
    #[must_use]
    pub(crate) fn target(&self) -> usize {
        let reserve = (self.limit / 64).clamp(256.min(self.limit / 4), 4096);
        let borne = self.borne();
        if borne == self.limit { self.limit - reserve } else { borne }
    }

    /// Pooled frames kept for fetches.
    #[must_use]
    pub(crate) fn pool_target(&self) -> usize {
        (self.limit / 64).clamp(POOLED_MIN, POOLED_MAX)
    }

    /// Use above which everything is registered.
    #[must_use]
    pub(crate) const fn adoption_mark(&self) -> usize {
        self.limit / 8 * 7
    }

    /// Pages that the victim buffer aims to hold.
    #[must_use]
    pub(crate) fn victim_target(&self) -> usize {
        (self.limit / 16).clamp(64, 16 << 10)
    }

    /// Estimated use now.
    #[must_use]
    pub(crate) const fn estimate(&self) -> usize {
        self.estimate
    }

    /// Pages above the target.
    #[must_use]
    pub(crate) fn excess(&self) -> usize {
        self.estimate.saturating_sub(self.target())
    }

    /// Whether nothing more may be touched for the first time.
    #[must_use]
    pub(crate) fn is_full(&self) -> bool {
        self.estimate >= self.borne()
    }

    /// Whether use is above the limit.
    pub(crate) const fn is_exceeded(&self) -> bool {
        self.estimate > self.limit
    }

    /// Pages were allocated by the pager's doing.
    pub(crate) const fn allocated(&mut self, pages: usize) {
        self.estimate += pages;
        self.changes += pages;
    }

    /// Pages were given back by the pager's doing.
    pub(crate) const fn freed(&mut self, pages: usize) {
        self.estimate = self.estimate.saturating_sub(pages);
        self.changes += pages;
    }

    /// Whether the size should be read now.
    #[must_use]
    pub(crate) fn is_due(&self, now: Nanos) -> bool {
        now >= self.next_reading || self.changes >= CHANGES_MAX
    }

    /// When it should be read next.
    #[must_use]
    pub(crate) const fn next_reading(&self) -> Nanos {
        self.next_reading
    }

    /// Takes a reading, with how long the program has run so far if that is known. Growth that the pager did
    /// not cause is added up, see [`Budget::unexplained`].
    pub(crate) fn measure(&mut self, now: Nanos, residents: Residents, ran: Option<Nanos>) {
        if now >= self.unmovable_until {
            self.unmovable = 0;
        }
        if now >= self.unadopted_until {
            self.unadopted = 0;
        }
        let growth = residents.anonymous.saturating_sub(self.estimate);
        self.unexplained += growth;
        self.estimate = residents.anonymous;
        self.measured = residents;
        self.changes = 0;
        let room = bytes_of(self.limit.saturating_sub(self.estimate)) as u64;
        let micros = (room / GROWTH_BYTES_PER_MICRO).clamp(PERIOD_MIN_MICROS, PERIOD_MAX_MICROS);
        self.note_quiet(now, ran, growth);
        self.next_reading = now.plus_micros(micros.max(self.quiet_micros));
    }

    /// Reads less often while the program hardly runs and nobody else fills its memory.
    fn note_quiet(&mut self, now: Nanos, ran: Option<Nanos>, growth: usize) {
        let (earlier, ran_then) = self.earlier;
        let (ran_since, passed) = match (ran, ran_then) {
            (Some(ran), Some(then)) => (ran.since(then), now.since(earlier)),
            _ => (u64::MAX, 0),
        };
        if growth > 0 || ran_since > passed / QUIET_SHARE {
            self.quiet_micros = 0;
        } else if passed >= QUIET_NANOS {
            self.quiet_micros =
                (self.quiet_micros * 2).clamp(PERIOD_MIN_MICROS, PERIOD_QUIET_MICROS);
        } else {
            return;
        }
        self.earlier = (now, ran);
    }

    /// The last reading.
    #[must_use]
    pub(crate) const fn measured(&self) -> Residents {
        self.measured
    }

    /// Growth that the pager did not cause, since it was last reset: new mappings.
    pub(crate) const fn unexplained(&self) -> usize {
        self.unexplained
    }

    /// Starts adding up anew.
    pub(crate) const fn reset_unexplained(&mut self) {
        self.unexplained = 0;
        // Some of what was not adopted is now.
        (self.seen, self.unadopted) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(limit: usize, anonymous: usize) -> Budget {
        let mut budget = Budget::new(bytes_of(limit) as u64);
        budget.measure(Nanos::new(0), Residents { anonymous, shared: 0 }, None);
        budget
    }

    /// 14 MiB of a limit of 16 MiB are not adopted: 8 MiB are left to what is.
    #[test]
    fn what_is_not_adopted_leaves_half_of_the_limit_to_what_is() {
        let mut budget = of(4096, 4096);
        budget.saw(412);
        assert!(budget.round_ended(Nanos::new(0), 100));
        budget.counted(Nanos::new(0), 512);
        assert_eq!((budget.target(), budget.is_full()), (3584 + 2048, false));
        budget.measure(Nanos::new(200_000_000), Residents { anonymous: 4096, shared: 0 }, None);
        assert!(budget.target() < 4096, "it is forgotten unless it is found again");
    }

    /// Everything waits to be stored while the hand goes round, and is back when it has: that the hand has
    /// seen nothing means nothing.
    #[test]
    fn what_came_back_behind_the_hand_is_not_taken_for_what_was_never_adopted() {
        let mut budget = of(4096, 4096);
        assert!(budget.round_ended(Nanos::new(0), 100));
        budget.counted(Nanos::new(0), 4000);
        assert!(budget.target() < 4096, "{}", budget.target());
        assert!(!budget.round_ended(Nanos::new(1_999_999), 100), "it was counted just now");
        assert!(budget.round_ended(Nanos::new(2_000_000), 100));
        budget.saw(3900);
        assert!(
            !budget.round_ended(Nanos::new(9_000_000), 100),
            "and where it has seen enough nobody need count"
        );
    }

    /// Reads the size of a program at its limit for so long, from where it was read last; `ran` tells how long it
    /// has run at a time. Returns the readings.
    fn readings(budget: &mut Budget, nanos: u64, ran: impl Fn(u64) -> u64) -> usize {
        let end = budget.next_reading().get() + nanos;
        let mut readings = 0;
        while budget.next_reading().get() < end {
            let now = budget.next_reading();
            let ran = Nanos::new(ran(now.get()));
            budget.measure(now, Residents { anonymous: 4096, shared: 0 }, Some(ran));
            readings += 1;
        }
        readings
    }

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_program_that_hardly_runs_is_read_less_often() {
        let mut budget = of(4096, 4096);
        let readings = readings(&mut budget, SECOND, |now| now / 100);
        assert!((250..500).contains(&readings), "{readings}");
    }

    /// Its clock is of the last tick, which may be 10 ms ago.
    #[test]
    fn a_program_that_runs_is_read_every_time() {
        for tick in [1, 4_000_000, 10_000_000] {
            let mut budget = of(4096, 4096);
            let ran = |now: u64| now / 2 / tick * tick;
            assert_eq!(readings(&mut budget, SECOND, ran), 2000, "{tick}");
        }
    }

    #[test]
    fn growth_ends_the_quiet_whoever_causes_it() {
        let mut budget = of(4096, 4000);
        readings(&mut budget, SECOND, |_| 0);
        let now = budget.next_reading();
        budget.measure(now, Residents { anonymous: 4097, shared: 0 }, Some(Nanos::new(0)));
        assert_eq!(budget.next_reading().since(now), 500_000);
    }

    #[test]
    fn a_large_limit_is_not_exceeded_by_more_than_the_least() {
        let mut budget = of(1 << 20, 1 << 20);
        assert!(budget.round_ended(Nanos::new(0), 0));
        budget.counted(Nanos::new(0), 0);
        assert_eq!(budget.target(), (1 << 20) + ADOPTED_LEAST_MAX);
        let mut budget = of(1 << 20, 1 << 20);
        budget.saw(1 << 19);
        assert!(!budget.round_ended(Nanos::new(0), 0));
        assert!(budget.target() < 1 << 20);
    }
}
