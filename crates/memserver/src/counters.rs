//! What the server counts, and why it dropped peers.

use std::array;
use std::sync::atomic::{AtomicU64, Ordering};

use farmem_wire::{Action, CountOf, DecodeError, RefusalCode, ServerStat, StatCount};

macro_rules! counters {
    ($($name:ident,)*) => {
        /// Counters since the start; gauges are asked where they live.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            /// Requests.
            pub(crate) served: Served,
            $(pub(crate) $name: AtomicU64,)*
        }

        impl Counters {
            /// Fills the counters' part of a stat.
            pub(crate) fn fill(&self, stat: &mut ServerStat) {
                $(stat.$name = self.$name.load(Ordering::Relaxed);)*
                self.served.fill(stat);
            }
        }
    };
}

counters! {
    connections,
    reads,
    writes,
    pages_read,
    pages_written,
    bytes_in,
    bytes_out,
    damaged_pages,
    connections_accepted,
    connections_refused,
    sessions_timed_out,
    bad_magic,
    bad_header_crc,
    bad_body_crc,
    too_large,
    bad_version,
    silent_peers,
    stalled_peers,
    slow_readers,
    demoted_pages,
    promoted_pages,
    tier_failures,
}

/// Adds to a counter.
pub(crate) fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// Actions and refusal codes that are counted apart have smaller numbers than this; others are
/// counted as number 0, which is neither an action nor a code.
const NUMBERS: usize = 64;

/// Requests by action and outcome, refusals by code.
#[derive(Debug)]
pub(crate) struct Served {
    actions: [OfAction; NUMBERS],
    codes: [AtomicU64; NUMBERS],
}

/// Requests for one action.
#[derive(Debug, Default)]
struct OfAction {
    granted: AtomicU64,
    refused: AtomicU64,
    latency: Latency,
}

impl Default for Served {
    fn default() -> Self {
        let actions = array::from_fn(|_| OfAction::default());
        Self { actions, codes: array::from_fn(|_| AtomicU64::new(0)) }
    }
}

impl Served {
    /// A request was granted after so much time.
    pub(crate) fn granted(&self, action: Action, nanos: u32) {
        let of = &self.actions[index(action.number().into())];
        count(&of.granted, 1);
        of.latency.record(nanos);
    }

    /// A request was refused after so much time.
    pub(crate) fn refused(&self, action: Action, code: RefusalCode, nanos: u32) {
        let of = &self.actions[index(action.number().into())];
        count(&of.refused, 1);
        of.latency.record(nanos);
        count(&self.codes[index(code.number())], 1);
    }

    /// How long the requests for an action took.
    pub(crate) const fn latency(&self, action: Action) -> &Latency {
        &self.actions[index(action.number() as u16)].latency
    }

    /// The actions that were asked for.
    pub(crate) fn actions(&self) -> impl Iterator<Item = Action> + '_ {
        let asked = (0..).zip(&self.actions).filter(|(_, of)| {
            of.granted.load(Ordering::Relaxed) + of.refused.load(Ordering::Relaxed) > 0
        });
        asked.map(|(number, _)| Action::from_number(number))
    }

    /// All that is not 0.
    pub(crate) fn counts(&self) -> impl Iterator<Item = StatCount> + '_ {
        let actions = (0..).zip(&self.actions).flat_map(|(number, of)| {
            let action = Action::from_number(number);
            [(CountOf::Granted(action), &of.granted), (CountOf::Refused(action), &of.refused)]
        });
        let codes = (0..).zip(&self.codes);
        let codes = codes.map(|(number, counter)| {
            (CountOf::Refusals(RefusalCode::from_number(number)), counter)
        });
        let counts = actions.chain(codes);
        counts
            .map(|(of, counter)| StatCount { of, count: counter.load(Ordering::Relaxed) })
            .filter(|count| count.count > 0)
    }

    fn fill(&self, stat: &mut ServerStat) {
        for StatCount { of, count } in self.counts() {
            match of {
                CountOf::Granted(_) => stat.requests += count,
                CountOf::Refused(_) => {
                    stat.requests += count;
                    stat.refusals += count;
                }
                CountOf::Refusals(_) => {}
            }
        }
        let (read, write) = (self.latency(Action::Read), self.latency(Action::Write));
        stat.read_p50_nanos = read.quantile(50);
        stat.read_p99_nanos = read.quantile(99);
        stat.write_p50_nanos = write.quantile(50);
        stat.write_p99_nanos = write.quantile(99);
    }
}

const fn index(number: u16) -> usize {
    if (number as usize) < NUMBERS { number as usize } else { 0 }
}

/// Bounds of the buckets, each twice the one before: from a quarter of a microsecond, which is
/// less than any request takes, to a second.
const BUCKETS: usize = 23;
const FIRST_BOUND_NANOS: u64 = 250;

/// A histogram of times.
#[derive(Debug)]
pub(crate) struct Latency {
    /// Those up to each bound and above the one before; the last one has no bound.
    buckets: [AtomicU64; BUCKETS + 1],
    sum_nanos: AtomicU64,
}

impl Default for Latency {
    fn default() -> Self {
        Self { buckets: array::from_fn(|_| AtomicU64::new(0)), sum_nanos: AtomicU64::new(0) }
    }
}

impl Latency {
    fn record(&self, nanos: u32) {
        let firsts = u64::from(nanos).div_ceil(FIRST_BOUND_NANOS).max(1);
        let bucket = firsts.next_power_of_two().trailing_zeros() as usize;
        count(&self.buckets[bucket.min(BUCKETS)], 1);
        count(&self.sum_nanos, nanos as usize);
    }

    /// For each bound, in nanoseconds, how many took no longer; last, without a bound, all.
    pub(crate) fn cumulated(&self) -> impl Iterator<Item = (Option<u64>, u64)> + '_ {
        let bounds = (0..BUCKETS).map(|bucket| Some(FIRST_BOUND_NANOS << bucket));
        let mut sum = 0;
        bounds.chain([None]).zip(&self.buckets).map(move |(bound, bucket)| {
            sum += bucket.load(Ordering::Relaxed);
            (bound, sum)
        })
    }

    /// Nanoseconds of all together.
    pub(crate) fn sum_nanos(&self) -> u64 {
        self.sum_nanos.load(Ordering::Relaxed)
    }

    /// The least bound that so many of a hundred kept, in nanoseconds; 0 if there were none.
    fn quantile(&self, percent: u64) -> u64 {
        let all = self.cumulated().last().map_or(0, |(_, all)| all);
        let enough = |(_, sum): &(Option<u64>, u64)| all > 0 && sum * 100 >= all * percent;
        match self.cumulated().find(enough) {
            Some((bound, _)) => bound.unwrap_or(FIRST_BOUND_NANOS << BUCKETS),
            None => 0,
        }
    }
}

/// Why a connection ends from our side.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DropReason {
    #[error("the peer has closed the connection")]
    Closed,
    #[error("the connection broke")]
    Broken(#[source] std::io::Error),
    #[error(transparent)]
    BadFrame(#[from] DecodeError),
    #[error("it sent a reply instead of a request")]
    NotARequest,
    #[error("it speaks protocol versions {oldest} to {newest} only")]
    Version { oldest: u16, newest: u16 },
    #[error("it did not say hello in time")]
    Silent,
    #[error("it did not finish a message in time")]
    Stalled,
    #[error("it did not take its replies in time")]
    SlowReader,
}

impl DropReason {
    /// Whether the peer misbehaved, so that a person may want to know.
    pub(crate) const fn is_worth_a_line(&self) -> bool {
        !matches!(self, Self::Closed | Self::Broken(_))
    }

    /// In log lines for programs; most are also the name of the counter.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Broken(_) => "broken",
            Self::BadFrame(DecodeError::Magic(_)) | Self::NotARequest => "bad_magic",
            Self::BadFrame(DecodeError::HeaderCrc { .. }) => "bad_header_crc",
            Self::BadFrame(DecodeError::BodyCrc { .. }) => "bad_body_crc",
            Self::BadFrame(DecodeError::TooLarge { .. }) => "too_large",
            Self::BadFrame(DecodeError::Version(_)) | Self::Version { .. } => "bad_version",
            Self::Silent => "silent_peers",
            Self::Stalled => "stalled_peers",
            Self::SlowReader => "slow_readers",
        }
    }

    pub(crate) fn count(&self, counters: &Counters) {
        let counter = match self {
            Self::Closed | Self::Broken(_) => return,
            Self::BadFrame(DecodeError::Magic(_)) | Self::NotARequest => &counters.bad_magic,
            Self::BadFrame(DecodeError::HeaderCrc { .. }) => &counters.bad_header_crc,
            Self::BadFrame(DecodeError::BodyCrc { .. }) => &counters.bad_body_crc,
            Self::BadFrame(DecodeError::TooLarge { .. }) => &counters.too_large,
            Self::BadFrame(DecodeError::Version(_)) | Self::Version { .. } => &counters.bad_version,
            Self::Silent => &counters.silent_peers,
            Self::Stalled => &counters.stalled_peers,
            Self::SlowReader => &counters.slow_readers,
        };
        count(counter, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_up_to_its_bound() {
        for (nanos, bound) in [
            (0, Some(250)),
            (250, Some(250)),
            (251, Some(500)),
            (500, Some(500)),
            (1_000_000, Some(1_024_000)),
            (u32::MAX, None),
        ] {
            let latency = Latency::default();
            latency.record(nanos);
            let first = latency.cumulated().find(|(_, sum)| *sum == 1).unwrap();
            assert_eq!(first.0, bound, "{nanos}");
            assert_eq!(latency.sum_nanos(), u64::from(nanos));
        }
    }

    #[test]
    fn quantiles_are_bounds() {
        let latency = Latency::default();
        assert_eq!(latency.quantile(50), 0);
        (0..99).for_each(|_| latency.record(300));
        latency.record(10_000);
        assert_eq!((latency.quantile(50), latency.quantile(99)), (500, 500));
        assert_eq!(latency.quantile(100), 16_000);
    }

    #[test]
    fn an_unknown_action_is_counted_as_such() {
        let served = Served::default();
        served.refused(Action::Unknown(200), RefusalCode::Unsupported, 5);
        let counts: Vec<_> = served.counts().collect();
        let of =
            [CountOf::Refused(Action::Unknown(0)), CountOf::Refusals(RefusalCode::Unsupported)];
        assert_eq!(counts, of.map(|of| StatCount { of, count: 1 }));
    }
}
