//! How the local limit of a run is divided among its processes.
//!
//! A process without a pager keeps what it has: that is taken off first. The rest belongs to those that
//! have a pager, by need: everyone gets a floor, and what is above that in proportion to *size times
//! activity*, where the size is what a process has here and out, and its activity grows with the
//! pages that are brought in for it. Nobody gets much more than its size while others want it.
//!
//! So that shares do not swing:
//!
//! * Activity is smoothed over a second or so.
//! * Shares move only while somebody is *pressed*: it uses its share up, and is due an eighth more
//!   than it has. They go a quarter of the way at each division. Who comes, and who needs less than its
//!   floor, is seen to at once.
//! * Changes too small to matter are not announced.
//!
//! And so that the sum over the tree stays within the limit, nobody is told of more before those who
//! lose have given their memory back.

use std::collections::BTreeMap;
use std::time::Duration;

/// A process with less hardly moves: buffers of its pager and what it touches all the time. Where not
/// everyone can have so much, all have the same.
const FLOOR_BYTES: u64 = 16 << 20;
/// The time over which activity is smoothed: what was before counts for a third after it.
const SMOOTHING: Duration = Duration::from_secs(1);
/// So many pages a second brought in make a process half as active as any can be: with 10 us each that
/// is a quarter of a hundredth of its time.
const HALF_ACTIVE: u64 = 256;
/// The most and the least that activity counts. With 64 to 1 an idle process keeps little but its
/// floor beside a busy one of the same size.
const ACTIVITY_MAX: u64 = 64;
/// What is added to a size that is wished for, for what will be touched next: a quarter and 8 MiB.
const HEADROOM_BYTES: u64 = 8 << 20;
/// Processes without a pager that have less together, and less than a sixteenth of the limit, do not count.
const UNCOUNTED_BYTES_MAX: u64 = 8 << 20;
/// How often shares are divided anew.
const PERIOD: Duration = Duration::from_millis(200);
/// And while somebody waits for what others still have to give back.
const PERIOD_WAITING: Duration = Duration::from_millis(10);

/// What a process uses, as its pager counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Use {
    /// Here.
    pub resident_bytes: u64,
    /// Out.
    pub external_bytes: u64,
    /// Pages brought in or touched for the first time, ever since it has a pager.
    pub pages_in: u64,
}

/// Divides a limit among members, which come and go. It gets the time with each call, from any zero.
#[derive(Debug)]
pub struct Budget<Member> {
    limit_bytes: u64,
    unpaged_bytes: u64,
    members: BTreeMap<Member, State>,
    next: Duration,
}

/// A member.
#[derive(Debug, Clone, Copy)]
struct State {
    /// Its share, as last announced; zero before the first time.
    told: u64,
    usage: Use,
    seen: Duration,
    /// Pages a second.
    rate: u64,
}

impl State {
    fn size(&self) -> u64 {
        self.usage.resident_bytes.saturating_add(self.usage.external_bytes)
    }

    /// More than this is of no use to it.
    fn wish(&self) -> u64 {
        let size = self.size();
        size.saturating_add(size / 4).saturating_add(HEADROOM_BYTES)
    }

    fn weight(&self) -> u64 {
        let activity = 1 + (ACTIVITY_MAX - 1) * self.rate / (self.rate + HALF_ACTIVE);
        (self.size() >> 12).saturating_add(1024).saturating_mul(activity)
    }

    /// What is taken from others' if this one is told a share.
    fn held(&self) -> u64 {
        self.told.max(self.usage.resident_bytes)
    }

    fn is_pressed(&self, target: u64) -> bool {
        let uses_all = self.usage.resident_bytes >= self.told / 8 * 7;
        uses_all && target >= self.told.saturating_add(self.told / 8)
    }
}

impl<Member: Copy + Ord> Budget<Member> {
    /// A budget nobody has a share of yet.
    #[must_use]
    pub const fn new(limit_bytes: u64) -> Self {
        let next = Duration::ZERO;
        Self { limit_bytes, unpaged_bytes: 0, members: BTreeMap::new(), next }
    }

    /// Takes in a member that has so much already. It counts as active.
    pub fn join(&mut self, now: Duration, member: Member, resident_bytes: u64) {
        let usage = Use { resident_bytes, ..Use::default() };
        let state = State { told: 0, usage, seen: now, rate: 3 * HALF_ACTIVE };
        self.members.insert(member, state);
        self.next = now;
    }

    /// Lets a member go.
    pub fn leave(&mut self, now: Duration, member: Member) {
        if self.members.remove(&member).is_some() {
            self.next = now;
        }
    }

    /// What a member uses now.
    pub fn note(&mut self, now: Duration, member: Member, usage: Use) {
        let Some(state) = self.members.get_mut(&member) else {
            return;
        };
        let passed = micros(now.saturating_sub(state.seen));
        let pages = usage.pages_in.saturating_sub(state.usage.pages_in).min(u64::MAX / 1_000_000);
        if let Some(rate) = (pages * 1_000_000).checked_div(passed) {
            let (old, new) = (u128::from(state.rate), u128::from(rate));
            let (passed, whole) = (u128::from(passed), u128::from(micros(SMOOTHING)));
            let rate = (old * whole + new * passed) / (whole + passed);
            state.rate = u64::try_from(rate).unwrap_or(u64::MAX >> 16).min(u64::MAX >> 16);
            state.seen = now;
        }
        state.usage = usage;
    }

    /// What all processes without a pager have now.
    pub fn note_unpaged(&mut self, now: Duration, bytes: u64) {
        // A shell or two beside a program move no shares.
        let bytes = if bytes < UNCOUNTED_BYTES_MAX.min(self.limit_bytes / 16) { 0 } else { bytes };
        // Short processes come and go: it is given back in steps.
        let step = self.limit_bytes / 32;
        if bytes > self.unpaged_bytes || bytes.saturating_add(step) < self.unpaged_bytes {
            self.unpaged_bytes = bytes;
            if !self.members.is_empty() {
                self.next = now;
            }
        }
    }

    /// When to call [`Self::divide`] next; `None` while there is nobody.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        (!self.members.is_empty()).then_some(self.next)
    }

    /// Divides anew, and returns the members whose share is no longer what they were told, with the new
    /// one. Those who lose come first, so that the sum of what is announced never exceeds the limit.
    pub fn divide(&mut self, now: Duration) -> Vec<(Member, u64)> {
        let before: BTreeMap<Member, u64> =
            self.members.iter().map(|(&m, s)| (m, s.told)).collect();
        let targets = self.targets();
        self.make_room(&targets);
        let mut changes: Vec<(Member, u64)> = self.told_otherwise(&before).collect();
        let losers = changes.len();
        let waits = self.hand_out(&targets);
        let gained = self.told_otherwise(&before);
        changes.extend(gained.filter(|(member, told)| before[member] < *told));
        debug_assert!(changes[..losers].iter().all(|(member, told)| before[member] > *told));
        self.next = now + if waits { PERIOD_WAITING } else { PERIOD };
        changes
    }

    fn told_otherwise<'a>(
        &'a self,
        before: &'a BTreeMap<Member, u64>,
    ) -> impl Iterator<Item = (Member, u64)> + 'a {
        let told = self.members.iter().map(|(&member, state)| (member, state.told));
        told.filter(|(member, told)| before[member] != *told)
    }

    /// The limit of the whole run.
    #[must_use]
    pub const fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// What each of so many processes gets in any case.
    #[must_use]
    pub fn floor_bytes(&self, members: usize) -> u64 {
        let members = u64::try_from(members.max(1)).unwrap_or(u64::MAX);
        FLOOR_BYTES.min(self.limit_bytes / members)
    }

    /// What there is to divide. However much is with processes that have no pager, the floors are
    /// left, or half of the limit.
    fn available(&self) -> u64 {
        let members = u64::try_from(self.members.len()).unwrap_or(u64::MAX);
        let least = FLOOR_BYTES.saturating_mul(members).min(self.limit_bytes / 2);
        self.limit_bytes.saturating_sub(self.unpaged_bytes).max(least)
    }

    /// What each member should have, if all of it could be moved at once.
    fn targets(&self) -> BTreeMap<Member, u64> {
        let members = u64::try_from(self.members.len()).unwrap_or(u64::MAX).max(1);
        let floor = FLOOR_BYTES.min(self.available() / members);
        let mut rest = self.available() - floor * members.min(self.available() / floor.max(1));
        let mut targets: BTreeMap<Member, u64> =
            self.members.keys().map(|&member| (member, floor)).collect();
        let mut open: Vec<Member> = self.members.keys().copied().collect();
        // Whoever would get more than it wishes for is content with that, and leaves the others more.
        loop {
            let weights: u128 = open.iter().map(|m| u128::from(self.members[m].weight())).sum();
            let content: Vec<Member> = open
                .iter()
                .copied()
                .filter(|m| {
                    let state = &self.members[m];
                    floor.saturating_add(part(rest, state.weight(), weights)) > state.wish()
                })
                .collect();
            if content.is_empty() || content.len() == open.len() {
                for member in open {
                    let more = part(rest, self.members[&member].weight(), weights);
                    targets.entry(member).and_modify(|target| *target += more);
                }
                return targets;
            }
            for member in content {
                let more = self.members[&member].wish().saturating_sub(floor).min(rest);
                rest -= more;
                targets.entry(member).and_modify(|target| *target += more);
                open.retain(|other| *other != member);
            }
        }
    }

    /// Takes from those who have more than they should: what the others must have at once, and a quarter
    /// of the way if somebody is pressed.
    fn make_room(&mut self, targets: &BTreeMap<Member, u64>) {
        let new: u64 =
            self.members.iter().filter(|(_, s)| s.told == 0).map(|(m, _)| targets[m]).sum();
        let told: u64 = self.members.values().map(|state| state.told).sum();
        let must = told.saturating_add(new).saturating_sub(self.available());
        let surplus: u64 =
            self.members.iter().map(|(m, s)| s.told.saturating_sub(targets[m])).sum();
        let pressed = self.members.iter().any(|(m, s)| s.told > 0 && s.is_pressed(targets[m]));
        let least = self.limit_bytes / 256;
        for (member, state) in &mut self.members {
            let above = state.told.saturating_sub(targets[member]);
            let due = part_up(must.min(surplus), above, surplus);
            let matters = pressed && above >= least.max(state.told / 32);
            let quarter = if matters { above / 4 } else { 0 };
            state.told -= due.max(quarter).min(above);
        }
    }

    /// Tells of more where there is more, the most active first; true if there would be more if what
    /// others were to give back had been.
    fn hand_out(&mut self, targets: &BTreeMap<Member, u64>) -> bool {
        let available = self.available();
        let mut order: Vec<Member> = self.members.keys().copied().collect();
        order.sort_by_key(|member| {
            let state = &self.members[member];
            (state.told > 0, std::cmp::Reverse(state.weight()))
        });
        let mut waits = false;
        for member in order {
            let target = targets[&member];
            let others = self.members.iter().filter(|(other, _)| **other != member);
            let (told, held) = others.fold((0_u64, 0_u64), |(told, held), (_, state)| {
                (told.saturating_add(state.told), held.saturating_add(state.held()))
            });
            let floor = self.floor_of_newcomer(target);
            let limit_bytes = self.limit_bytes;
            let Some(state) = self.members.get_mut(&member) else { continue };
            let most = target.min(available.saturating_sub(told));
            let now = most.min(available.saturating_sub(held));
            let now = if state.told == 0 { now.max(floor.min(most)) } else { now };
            let least = (limit_bytes / 256).max(state.told / 32);
            waits |= most > now && most - now >= least && most > state.told;
            let matters =
                state.told == 0 || now == target || now.saturating_sub(state.told) >= least;
            if now > state.told && matters {
                state.told = now;
            }
        }
        waits
    }

    /// A newcomer begins with so much even where others have not given it back yet.
    fn floor_of_newcomer(&self, target: u64) -> u64 {
        target.min(self.floor_bytes(self.members.len()))
    }
}

/// `of` times `parts` of `all`, rounded down.
fn part(of: u64, parts: u64, all: u128) -> u64 {
    let part = u128::from(of) * u128::from(parts) / all.max(1);
    u64::try_from(part).unwrap_or(of).min(of)
}

/// The same, rounded up.
fn part_up(of: u64, parts: u64, all: u64) -> u64 {
    let part = (u128::from(of) * u128::from(parts)).div_ceil(u128::from(all.max(1)));
    u64::try_from(part).unwrap_or(of).min(of)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// A process that touches `size` bytes over and over, or nothing.
    #[derive(Debug, Clone, Copy)]
    struct Process {
        size: u64,
        is_busy: bool,
        resident: u64,
        pages_in: u64,
        share: u64,
    }

    impl Process {
        const fn new(mebibytes: u64, is_busy: bool) -> Self {
            let size = mebibytes * MIB;
            Self { size, is_busy, resident: 0, pages_in: 0, share: 0 }
        }

        /// 10 ms pass.
        fn pass(&mut self) {
            // 1 GiB a second goes out.
            self.resident =
                self.resident.min(self.share.max(self.resident.saturating_sub(10 * MIB)));
            if self.is_busy {
                let absent = self.size.saturating_sub(self.resident);
                // A third of a gigabyte a second comes in as long as something is not there.
                self.pages_in += (absent >> 12).min(1000);
                self.resident = self.share.min(self.resident + absent.min(4 * MIB));
            }
        }

        fn usage(&self) -> Use {
            Use {
                resident_bytes: self.resident,
                external_bytes: self.size.saturating_sub(self.resident),
                pages_in: self.pages_in,
            }
        }
    }

    /// Lets processes run until `millis`, and returns the largest sum of what was resident.
    fn live(budget: &mut Budget<usize>, processes: &mut [Process], from: u64, millis: u64) -> u64 {
        let mut most = 0;
        for now in (from..millis).step_by(10) {
            processes.iter_mut().for_each(Process::pass);
            if budget.next().is_some_and(|next| next <= at(now)) {
                for (member, process) in processes.iter().enumerate() {
                    budget.note(at(now), member, process.usage());
                }
                for (member, share) in budget.divide(at(now)) {
                    processes[member].share = share;
                }
            }
            most = most.max(processes.iter().map(|process| process.resident).sum());
        }
        most
    }

    fn with(limit: u64, processes: &mut [Process]) -> Budget<usize> {
        let mut budget = Budget::new(limit);
        for member in 0..processes.len() {
            budget.join(at(0), member, 0);
            budget.divide(at(0));
        }
        for (member, state) in &budget.members {
            processes[*member].share = state.told;
        }
        budget
    }

    #[test]
    fn the_first_loses_before_the_second_gains() {
        let mut budget = Budget::new(100);
        budget.join(at(0), 'a', 0);
        assert_eq!(budget.divide(at(0)), [('a', 100)]);
        budget.join(at(1), 'b', 0);
        assert_eq!(budget.divide(at(1)), [('a', 50), ('b', 50)]);
        assert_eq!(budget.divide(at(2)), []);
        budget.leave(at(3), 'a');
        assert_eq!(budget.divide(at(3)), [('b', 100)]);
    }

    /// Cap 33: one of three workers sleeps. The others have what it does not need.
    #[test]
    fn cap_33_an_idle_process_keeps_little_and_busy_ones_share_the_rest() {
        let mut workers =
            [Process::new(200, true), Process::new(200, true), Process::new(200, true)];
        let mut budget = with(256 * MIB, &mut workers);
        live(&mut budget, &mut workers, 0, 3_000);
        let shares = workers.map(|worker| worker.share / MIB);
        assert!(shares.iter().all(|share| (80..=90).contains(share)), "{shares:?}");
        workers[2].is_busy = false;
        let most = live(&mut budget, &mut workers, 3_000, 13_000);
        let shares = workers.map(|worker| worker.share / MIB);
        assert!(shares[0] >= 100 && shares[1] >= 100, "{shares:?}");
        assert!((16..40).contains(&shares[2]), "{shares:?}");
        assert!(most <= 256 * MIB, "{most}");
        // It wakes up, and has its part again soon.
        workers[2].is_busy = true;
        workers[1].is_busy = false;
        live(&mut budget, &mut workers, 13_000, 23_000);
        let shares = workers.map(|worker| worker.share / MIB);
        assert!(shares[2] >= 100 && shares[1] < 40, "{shares:?}");
    }

    #[test]
    fn cap_33_a_small_process_leaves_what_it_does_not_need() {
        let mut both = [Process::new(30, true), Process::new(1000, true)];
        let mut budget = with(256 * MIB, &mut both);
        live(&mut budget, &mut both, 0, 10_000);
        let shares = both.map(|process| process.share / MIB);
        assert!(shares[1] > 190, "{shares:?}");
    }

    #[test]
    fn cap_33_shares_do_not_swing_while_nothing_changes() {
        let mut three = [Process::new(100, true), Process::new(200, true), Process::new(50, false)];
        let mut budget = with(128 * MIB, &mut three);
        live(&mut budget, &mut three, 0, 20_000);
        let before = three.map(|process| process.share);
        live(&mut budget, &mut three, 20_000, 40_000);
        for (process, before) in three.iter().zip(before) {
            assert!(process.share.abs_diff(before) <= 4 * MIB, "{three:?} {before}");
        }
    }

    #[test]
    fn cap_33_processes_without_a_pager_count() {
        let mut budget = Budget::new(256 * MIB);
        budget.join(at(0), 0, 200 * MIB);
        assert_eq!(budget.divide(at(0)), [(0, 256 * MIB)]);
        budget.note_unpaged(at(1), 100 * MIB);
        assert_eq!(budget.divide(at(1)), [(0, 156 * MIB)]);
        // Half of the limit at most is left to them, where the floors are less.
        budget.note_unpaged(at(2), 1000 * MIB);
        assert_eq!(budget.divide(at(2)), [(0, 16 * MIB)]);
        budget.note_unpaged(at(3), 0);
        assert_eq!(budget.divide(at(3)), [(0, 256 * MIB)]);
    }

    #[test]
    fn cap_33_nobody_gains_before_the_loser_has_given_its_memory_back() {
        let mut budget = Budget::new(256 * MIB);
        budget.join(at(0), 'a', 256 * MIB);
        budget.divide(at(0));
        budget.join(at(1), 'b', 40 * MIB);
        let changes = budget.divide(at(1));
        let [('a', first), ('b', second)] = changes[..] else { panic!("{changes:?}") };
        assert!(first < 256 * MIB && second == FLOOR_BYTES, "{changes:?}");
        assert_eq!(budget.next(), Some(at(1) + PERIOD_WAITING));
        let usage = Use { resident_bytes: first, external_bytes: 100 * MIB, pages_in: 0 };
        budget.note(at(11), 'a', usage);
        let changes = budget.divide(at(11));
        assert!(changes.iter().any(|&(who, share)| who == 'b' && share > FLOOR_BYTES));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Join(u8, u64),
        Leave(u8),
        Note(u8, u64, u64, u64),
        Unpaged(u64),
        Divide,
    }

    fn steps() -> impl Strategy<Value = Vec<(u64, Step)>> {
        let bytes = || prop_oneof![0_u64..1 << 20, 0_u64..1 << 34, Just(u64::MAX / 4)];
        let step = prop_oneof![
            (0_u8..12, bytes()).prop_map(|(who, bytes)| Step::Join(who, bytes)),
            (0_u8..12).prop_map(Step::Leave),
            (0_u8..12, bytes(), bytes(), any::<u64>())
                .prop_map(|(who, here, out, pages)| Step::Note(who, here, out, pages)),
            bytes().prop_map(Step::Unpaged),
            Just(Step::Divide),
        ];
        prop::collection::vec((0_u64..2_000, step), 1..150)
    }

    proptest! {
        /// At every moment, between two messages too.
        #[test]
        fn cap_33_what_members_were_told_never_exceeds_the_limit(
            // From one page on: of less nobody can be given a part.
            limit in prop_oneof![1_u64 << 12..1 << 14, 1_u64 << 12..1 << 50],
            steps in steps(),
        ) {
            let mut budget = Budget::new(limit);
            let mut told: BTreeMap<u8, u64> = BTreeMap::new();
            let mut here: BTreeMap<u8, u64> = BTreeMap::new();
            let mut now = Duration::ZERO;
            for (pause, step) in steps {
                now += at(pause);
                match step {
                    Step::Join(who, bytes) => {
                        told.remove(&who);
                        here.insert(who, bytes);
                        budget.join(now, who, bytes);
                    }
                    Step::Leave(who) => {
                        told.remove(&who);
                        budget.leave(now, who);
                    }
                    Step::Note(who, resident_bytes, external_bytes, pages_in) => {
                        here.insert(who, resident_bytes);
                        budget.note(now, who, Use { resident_bytes, external_bytes, pages_in });
                    }
                    Step::Unpaged(bytes) => budget.note_unpaged(now, bytes),
                    Step::Divide => {}
                }
                let newcomers: Vec<u8> =
                    budget.members.keys().copied().filter(|who| !told.contains_key(who)).collect();
                let before = told.clone();
                for (who, share) in budget.divide(now) {
                    prop_assert_ne!(told.insert(who, share), Some(share));
                    prop_assert!(told.values().sum::<u64>() <= limit);
                }
                prop_assert_eq!(told.len(), budget.members.len(), "everybody is told a share");
                prop_assert!(told.values().sum::<u64>() <= budget.available());
                // Who was there gains only what nobody holds.
                let gained = told.iter().any(|(who, share)| {
                    before.get(who).is_some_and(|before| before < share)
                });
                if gained && newcomers.is_empty() && told.len() > 1 {
                    let held = |(who, share): (&u8, &u64)| (*share).max(here[who]);
                    let winners = told.iter().filter(|(who, share)| before[who] < **share);
                    for winner in winners {
                        let others = told.iter().filter(|(who, _)| *who != winner.0).map(held);
                        let others = others.fold(0_u64, u64::saturating_add);
                        prop_assert!(others.saturating_add(*winner.1) <= budget.available());
                    }
                }
            }
        }

        /// Whatever has happened, processes that need the same get the same in the end, and nobody starves.
        #[test]
        fn cap_33_equals_get_equal_shares_in_the_end(
            count in 1_usize..9,
            limit in 64_u64..1024,
            size in 100_u64..2000,
            idle in 0_usize..9,
        ) {
            let mut processes: Vec<Process> =
                (0..count).map(|number| Process::new(size, number != idle)).collect();
            let mut budget = with(limit * MIB, &mut processes);
            let most = live(&mut budget, &mut processes, 0, 10_000);
            processes.iter_mut().for_each(|process| process.is_busy = true);
            let later = live(&mut budget, &mut processes, 10_000, 40_000);
            prop_assert!(most.max(later) <= limit * MIB);
            let fair = limit * MIB / count as u64;
            for process in &processes {
                let wish = fair.min(size * MIB);
                prop_assert!(process.share >= wish / 4 * 3, "{processes:?}");
            }
        }
    }
}
