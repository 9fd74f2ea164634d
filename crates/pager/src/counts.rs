//! What the pager counts.

/// Totals since the start, in pages unless said otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Faults read.
    pub faults: u64,
    /// Pages that came from the servers.
    pub fetched_pages: u64,
    /// Of these, pages that no thread had asked for yet.
    pub readahead_pages: u64,
    /// Read-ahead pages that the program was then seen to use.
    pub readahead_hits: u64,
    /// Pages moved out.
    pub evicted_pages: u64,
    /// Pages acknowledged by the servers.
    pub written_pages: u64,
    /// Faults answered from the victim buffer.
    pub victim_hits: u64,
    /// Pages filled with zeros on first touch.
    pub zero_pages: u64,
    /// Pages moved out that were all zero, and so never sent.
    pub zero_drops: u64,
    /// Pages moved out that the servers had already.
    pub clean_drops: u64,
    /// Pages that could not be moved (pinned, or shared with a forked child).
    pub busy_pages: u64,
    /// Windows whose pages were made movable that a forked child had too.
    pub unshared_windows: u64,
    /// Changes of mappings that the kernel reported, of all kinds.
    pub events: u64,
    /// Of these: contents dropped by madvise.
    pub removes: u64,
    /// Of these: moves by mremap.
    pub remaps: u64,
    /// Of these: mappings gone.
    pub unmaps: u64,
    /// Forks seen.
    pub forks: u64,
    /// Pages on the servers now and at most.
    pub external_pages: u64,
    /// The most so far.
    pub external_pages_peak: u64,
    /// Pages in the victim buffer now.
    pub victim_pages: u64,
    /// Pages of anonymous memory now, the pager's own included.
    pub local_pages: u64,
    /// The most so far.
    pub local_pages_peak: u64,
    /// Pages of shared and file memory now: not paged.
    pub shared_pages: u64,
    /// Pages of memory that the program pages by a userfaultfd of its own, at the most.
    pub foreign_pages_peak: u64,
}

/// What a latency is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Latency {
    /// A fault, from the moment it is read to its answer.
    Fault,
    /// The part between asking the servers and their answer, without the next.
    Network,
    /// The part that the server reports as its own.
    Server,
    /// The part between the answer and the page being in place.
    Install,
}

/// One measured latency.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Of what.
    pub latency: Latency,
    /// How long.
    pub nanos: u64,
}
