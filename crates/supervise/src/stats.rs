//! The stats page: counters and latency histograms that a pager writes and the supervisor reads.
//!
//! The page is a memfd that the pager maps and whose descriptor the supervisor holds. It outlives
//! the pager, so that the counts of a program that was killed are not lost. Every field is one
//! 64-bit word in the machine's byte order; the page never leaves the machine.
//!
//! ```text
//! word 0        MAGIC
//! word 1        VERSION
//! word 2..      one word a Counter, in the order of their declaration
//! then          for each Histogram, in the order of their declaration, BUCKETS words
//! ```
//!
//! A histogram is log-linear: below 16 ns a bucket a nanosecond, above 16 buckets an octave (so
//! that a quantile is at most 6 % off), and one last bucket for all of 2^30 ns (1.07 s) and more.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// "FARMSTAT" in the byte order of the machine that writes it.
const MAGIC: u64 = 0x4641_524d_5354_4154;
/// Changes with every change of the layout.
const VERSION: u64 = 1;
/// Words before the counters.
const HEADER_WORDS: usize = 2;

/// `log2` of the buckets in an octave.
const SUB_BUCKET_BITS: u32 = 4;
const SUB_BUCKETS: usize = 1 << SUB_BUCKET_BITS;
/// Values of `2^OCTAVE_END` nanoseconds and more share the last bucket.
const OCTAVE_END: u32 = 30;
/// Buckets of one histogram.
const BUCKETS: usize = (OCTAVE_END - SUB_BUCKET_BITS + 1) as usize * SUB_BUCKETS + 1;

macro_rules! fields {
    ($(#[$enum_doc:meta])* $enum:ident { $($(#[$doc:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$enum_doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $enum {
            $($(#[$doc])* $variant,)*
        }

        impl $enum {
            /// All of them, in the order of the page.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Its name in `--stats` files.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

fields! {
    /// One word of the stats page. Names that end in `_bytes` and [`Self::VictimPages`] are the present
    /// value (or, with `peak`, the largest so far); all others only grow.
    Counter {
        /// The process's share of the local limit.
        LimitBytes = "limit_bytes",
        /// What is resident now: pages of the program that count against the limit, the
        /// victim buffer and the pager's own memory.
        ResidentBytes = "resident_bytes",
        /// The most that was resident.
        LocalPeakBytes = "local_peak_bytes",
        /// What is out now: pages that only the server holds.
        ExternalBytes = "external_bytes",
        /// The most that was out.
        ExternalPeakBytes = "external_peak_bytes",
        /// The pager's own memory, contained in the resident bytes.
        PagerBytes = "pager_bytes",
        /// Pages that rest in the victim buffer now.
        VictimPages = "victim_pages",
        /// Faults that the pager answered.
        Faults = "faults",
        /// Pages that came from the server.
        FetchedPages = "fetched_pages",
        /// Pages fetched before anybody asked for them.
        ReadaheadPages = "readahead_pages",
        /// Pages fetched ahead that were then touched.
        ReadaheadHits = "readahead_hits",
        /// Pages moved out of the program.
        EvictedPages = "evicted_pages",
        /// Pages sent to the server.
        WrittenPages = "written_pages",
        /// Faults answered from the victim buffer, without the network.
        VictimHits = "victim_hits",
        /// Evicted pages that held only zeros and were not sent.
        ZeroPages = "zero_pages",
        /// Pages never written before that the pager filled with zeros.
        ZeroFilledPages = "zero_filled_pages",
        /// Evicted pages that the server already held, and were not sent again.
        CleanDroppedPages = "clean_dropped_pages",
        /// Pages that could not be moved: pinned by the kernel, or shared since a fork.
        BusyPages = "busy_pages",
        /// Remove events (madvise).
        RemoveEvents = "remove_events",
        /// Remap events (mremap).
        RemapEvents = "remap_events",
        /// Unmap events.
        UnmapEvents = "unmap_events",
        /// Fork events.
        ForkEvents = "fork_events",
        /// Connections made to the server.
        Connections = "connections",
        /// Sessions opened on the server.
        Sessions = "sessions",
        /// Shared memory, at the most.
        UnpageableSharedBytes = "unpageable_shared_bytes",
        /// Files and code.
        UnpageableFileBytes = "unpageable_file_bytes",
        /// Memory of a userfaultfd of the program's own, at the most.
        UnpageableForeignBytes = "unpageable_foreign_bytes",
    }
}

fields! {
    /// One latency histogram, in nanoseconds.
    Histogram {
        /// From the fault to the thread's going on, as far as the pager sees it.
        Fault = "fault",
        /// On the wire and in queues: the request's round trip without the server's share.
        Network = "fault_network",
        /// In the server, as it reports.
        Server = "fault_server",
        /// From the reply to the page's being in place.
        Install = "fault_install",
    }
}

impl Counter {
    /// The counter's word.
    #[must_use]
    pub const fn index(self) -> usize {
        HEADER_WORDS + self as usize
    }
}

impl Histogram {
    /// The word of the first bucket.
    const fn start(self) -> usize {
        HEADER_WORDS + Counter::ALL.len() + self as usize * BUCKETS
    }

    /// The word that counts a latency of that many nanoseconds.
    #[must_use]
    pub const fn record_index(self, nanos: u64) -> usize {
        self.start() + bucket_of(nanos)
    }
}

const fn bucket_of(nanos: u64) -> usize {
    if nanos < SUB_BUCKETS as u64 {
        return nanos as usize;
    }
    let octave = nanos.ilog2();
    if octave >= OCTAVE_END {
        return BUCKETS - 1;
    }
    let shift = octave - SUB_BUCKET_BITS;
    // The top bit of the shifted value is the octave's; the SUB_BUCKET_BITS below it choose.
    let sub_bucket = (nanos >> shift) as usize - SUB_BUCKETS;
    (shift as usize + 1) * SUB_BUCKETS + sub_bucket
}

/// The least number of nanoseconds that falls in the bucket.
const fn bucket_floor(bucket: usize) -> u64 {
    if bucket < SUB_BUCKETS {
        return bucket as u64;
    }
    let shift = bucket / SUB_BUCKETS - 1;
    ((bucket % SUB_BUCKETS + SUB_BUCKETS) as u64) << shift
}

/// The page's size.
#[derive(Debug, Clone, Copy)]
pub struct StatsLayout;

impl StatsLayout {
    /// Words that the page has.
    pub const WORDS: usize = HEADER_WORDS + Counter::ALL.len() + Histogram::ALL.len() * BUCKETS;
    /// Bytes to map: the words, rounded up to whole pages.
    pub const BYTES: usize = (Self::WORDS * size_of::<u64>()).next_multiple_of(4096);
}

/// The pager's side. Copies write the same page.
#[derive(Debug, Clone, Copy)]
pub struct StatsWriter<'a> {
    words: &'a [AtomicU64],
}

impl<'a> StatsWriter<'a> {
    /// Marks the mapped, zeroed page as a stats page.
    ///
    /// # Panics
    /// If there are fewer than [`StatsLayout::WORDS`] words.
    #[must_use]
    pub fn new(words: &'a [AtomicU64]) -> Self {
        assert!(words.len() >= StatsLayout::WORDS, "the page has {} words", words.len());
        words[1].store(VERSION, Ordering::Relaxed);
        words[0].store(MAGIC, Ordering::Relaxed);
        Self { words }
    }

    /// Counts `count` more.
    pub fn add(&self, counter: Counter, count: u64) {
        self.words[counter.index()].fetch_add(count, Ordering::Relaxed);
    }

    /// Replaces the value.
    pub fn set(&self, counter: Counter, value: u64) {
        self.words[counter.index()].store(value, Ordering::Relaxed);
    }

    /// Replaces the value with `value` if that is more.
    pub fn raise(&self, counter: Counter, value: u64) {
        self.words[counter.index()].fetch_max(value, Ordering::Relaxed);
    }

    /// The present value.
    #[must_use]
    pub fn get(&self, counter: Counter) -> u64 {
        self.words[counter.index()].load(Ordering::Relaxed)
    }

    /// Counts one latency.
    pub fn record(&self, histogram: Histogram, nanos: u64) {
        self.words[histogram.record_index(nanos)].fetch_add(1, Ordering::Relaxed);
    }
}

/// Why a stats page cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// The descriptor does not give a page's worth.
    #[error("cannot read the stats page")]
    Read(#[source] io::Error),
    /// Something else, or of another version.
    #[error("the descriptor is no stats page of version {VERSION}")]
    NotStats,
}

/// What one stats page held at one time, or the sum of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatsSnapshot {
    words: Box<[u64]>,
}

impl StatsSnapshot {
    /// All zero.
    #[must_use]
    pub fn empty() -> Self {
        Self { words: vec![0; StatsLayout::WORDS].into_boxed_slice() }
    }

    /// Reads the page behind `memfd`.
    ///
    /// # Errors
    /// [`StatsError::Read`] if it is shorter than a page, [`StatsError::NotStats`] if it is
    /// something else.
    pub fn read(memfd: impl AsFd) -> Result<Self, StatsError> {
        let mut bytes = vec![0; StatsLayout::WORDS * size_of::<u64>()];
        let mut filled = 0;
        while filled < bytes.len() {
            match rustix::io::pread(&memfd, &mut bytes[filled..], filled as u64) {
                Ok(0) => return Err(StatsError::Read(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => filled += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(StatsError::Read(errno.into())),
            }
        }
        let (words, _) = bytes.as_chunks::<8>();
        #[expect(clippy::host_endian_bytes, reason = "another process of this machine wrote it")]
        let words: Box<[u64]> = words.iter().map(|&word| u64::from_ne_bytes(word)).collect();
        if words[0] != MAGIC || words[1] != VERSION {
            return Err(StatsError::NotStats);
        }
        Ok(Self { words })
    }

    /// One counter.
    #[must_use]
    pub fn get(&self, counter: Counter) -> u64 {
        self.words[counter.index()]
    }

    /// One histogram.
    #[must_use]
    pub fn histogram(&self, histogram: Histogram) -> HistogramSnapshot<'_> {
        HistogramSnapshot { buckets: &self.words[histogram.start()..][..BUCKETS] }
    }

    /// Adds the other's counts. Sums of peaks are upper bounds: the peaks may have been at different
    /// times.
    pub fn add(&mut self, other: &Self) {
        for (sum, word) in self.words.iter_mut().zip(&other.words).skip(HEADER_WORDS) {
            *sum = sum.saturating_add(*word);
        }
    }
}

/// One histogram of a snapshot.
#[derive(Debug, Clone, Copy)]
pub struct HistogramSnapshot<'a> {
    buckets: &'a [u64],
}

impl HistogramSnapshot<'_> {
    /// How many latencies were recorded.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, &count| sum.saturating_add(count))
    }

    /// The latency in nanoseconds that `parts` of `of` latencies do not exceed (the middle of its
    /// bucket), or `None` where nothing was recorded. The median is `quantile(1, 2)`.
    #[must_use]
    pub fn quantile(&self, parts: u64, of: u64) -> Option<u64> {
        let count = self.count();
        let rank = u128::from(count) * u128::from(parts);
        let rank = rank.div_ceil(u128::from(of.max(1))).max(1);
        let mut below = 0_u128;
        for (bucket, &count) in self.buckets.iter().enumerate() {
            below += u128::from(count);
            if below >= rank {
                let floor = bucket_floor(bucket);
                let width = bucket_floor(bucket + 1) - floor;
                return Some(floor + width / 2);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn words() -> Vec<AtomicU64> {
        (0..StatsLayout::WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    #[expect(clippy::host_endian_bytes, reason = "the page is in the machine's byte order")]
    fn snapshot(words: &[AtomicU64]) -> Result<StatsSnapshot, StatsError> {
        let memfd = memfd_create("stats", MemfdFlags::CLOEXEC).unwrap();
        let bytes: Vec<u8> =
            words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        rustix::io::pwrite(&memfd, &bytes, 0).unwrap();
        StatsSnapshot::read(&memfd)
    }

    #[test]
    fn what_was_written_is_read_and_summed() {
        let (one, two) = (words(), words());
        let first = StatsWriter::new(&one);
        first.add(Counter::Faults, 3);
        first.raise(Counter::LocalPeakBytes, 10);
        first.raise(Counter::LocalPeakBytes, 5);
        first.record(Histogram::Install, 1_000);
        let second = StatsWriter::new(&two);
        second.set(Counter::Faults, 4);
        second.record(Histogram::Install, 1_000_000_000_000);
        let mut sum = StatsSnapshot::empty();
        sum.add(&snapshot(&one).unwrap());
        sum.add(&snapshot(&two).unwrap());
        assert_eq!(sum.get(Counter::Faults), 7);
        assert_eq!(sum.get(Counter::LocalPeakBytes), 10);
        assert_eq!(sum.histogram(Histogram::Install).count(), 2);
        assert_eq!(sum.histogram(Histogram::Fault).count(), 0);
        // No field is beside itself: the last counter and the first bucket are neighbours.
        assert_eq!(Histogram::Fault.record_index(0), Counter::ALL.last().unwrap().index() + 1);
    }

    #[test]
    fn quantiles_are_those_of_the_recorded_latencies_within_a_bucket() {
        let page = words();
        let writer = StatsWriter::new(&page);
        for micros in 1..=1_000 {
            writer.record(Histogram::Fault, micros * 1_000);
        }
        let snapshot = snapshot(&page).unwrap();
        let fault = snapshot.histogram(Histogram::Fault);
        for (parts, of, expected) in
            [(1, 2, 500_000), (99, 100, 990_000), (999, 1000, 999_000), (0, 1, 1_000)]
        {
            let found = fault.quantile(parts, of).unwrap();
            assert!(found.abs_diff(expected) <= expected / 16, "{parts}/{of}: {found}");
        }
        assert_eq!(snapshot.histogram(Histogram::Network).quantile(1, 2), None);
    }

    #[test]
    fn what_is_no_stats_page_is_refused() {
        assert!(matches!(snapshot(&words()), Err(StatsError::NotStats)));
        assert!(matches!(snapshot(&words()[1..]), Err(StatsError::Read(_))));
    }

    proptest! {
        #[test]
        fn every_latency_falls_in_the_bucket_that_spans_it(nanos in 0_u64..1 << 33) {
            let bucket = bucket_of(nanos);
            prop_assert!(bucket_floor(bucket) <= nanos);
            prop_assert!(bucket == BUCKETS - 1 || nanos < bucket_floor(bucket + 1));
        }
    }
}
