//! Read-ahead: guesses from the faults so far which pages a program will touch next.
//!
//! A *stream* is a sequence of faults at a constant distance: 1 page (sequential), several, or
//! backwards. When a stream is recognised, pages ahead of it are fetched in windows that double
//! up to a limit. The first page of each window is a *marker*: it is brought in but not yet
//! installed, so that the program's arrival there is seen (without network) and the next window
//! is asked for while the program works on this one.
//!
//! ```text
//!            last                marker                              frontier
//!   ----------+---------------------+-----------------------------------+-------> by strides
//!    touched  | brought, in use     | brought, not yet reached          | not asked for
//! ```
//!
//! Pages of a window may be there already, or be lost on the way, so a fault anywhere on the
//! stream's path up to a little past the frontier belongs to it. What is touched in no such order
//! but densely, by several interleaved sequences of which each leaves gaps for example, is found
//! by [`Blocks`].

use farmem_region::PAGE_SHIFT;

/// Streams followed at once; the one idle for longest is replaced. A loop over a handful of
/// arrays in several threads needs one each.
const STREAMS_MAX: usize = 32;
/// Two faults at most this many pages apart may belong to one stream.
const STRIDE_MAX: isize = 64;
/// Equal distances in a row after which a stream is believed.
const CONFIDENT: u8 = 2;
/// First window of a stream, in pages.
const WINDOW_FIRST: u32 = 8;
/// Strides past the frontier at which a fault still belongs to the stream: a few pages there may
/// be resident.
const SLACK_STRIDES: usize = 4;

/// Pages to bring in because a fault suggests that they come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Address of the first page to bring in.
    pub(crate) start: usize,
    /// Distance from one page to the next in bytes; may be negative.
    pub(crate) step: isize,
    /// Number of pages.
    pub(crate) count: u32,
    /// Pages brought by the plan before, which the program has thereby been seen to use.
    pub(crate) used: u32,
    /// The first page is to be a marker.
    pub(crate) marked: bool,
}

impl Plan {
    /// The addresses, as far as they are in the address space.
    pub(crate) fn addresses(self) -> impl Iterator<Item = usize> {
        (0..self.count as isize)
            .map_while(move |at| self.start.checked_add_signed(self.step.checked_mul(at)?))
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// Page number of the last fault.
    last: usize,
    /// Pages from one fault to the next; 0: not known yet.
    stride: isize,
    /// Equal strides in a row.
    confidence: u8,
    /// Pages asked for by the last plan.
    window: u32,
    /// How many of them were brought.
    brought: u32,
    /// Where the last plan started. 0: there is none.
    marker: usize,
    /// The page after the last one asked for.
    frontier: usize,
    /// When it was last used, for replacement.
    tick: u64,
}

/// The streams of one address space.
#[derive(Debug)]
pub(crate) struct Streams {
    streams: [Stream; STREAMS_MAX],
    blocks: Blocks,
    tick: u64,
    window_max: u32,
}

impl Streams {
    /// Windows grow up to `window_max` pages; 0 switches read-ahead off.
    #[must_use]
    pub(crate) fn new(window_max: u32) -> Self {
        let blocks = Blocks::default();
        Self { streams: [Stream::default(); STREAMS_MAX], blocks, tick: 0, window_max }
    }

    /// Takes note of a fault and says what to bring in besides the page itself, which is brought or
    /// being brought already if `brought` holds.
    pub(crate) fn on_fault(&mut self, address: usize, brought: bool) -> Option<Plan> {
        if self.window_max == 0 {
            return None;
        }
        self.tick += 1;
        let (tick, window_max) = (self.tick, self.window_max);
        let page = address >> PAGE_SHIFT;
        if let Some((stream, reached)) =
            self.streams.iter_mut().find_map(|s| s.reached(page).map(|reached| (s, reached)))
        {
            stream.tick = tick;
            stream.last = page;
            return match reached {
                Reached::Window if brought => Some(stream.advance(page, window_max)),
                Reached::End => Some(stream.advance(page, window_max)),
                Reached::Window => stream.refill(page, stream.frontier),
                Reached::Behind => stream.refill(page, stream.marker),
            };
        }
        let plan = match self.find(page) {
            Some(stream) => stream.follow(page, tick, window_max),
            None => {
                self.start(page);
                None
            }
        };
        plan.or_else(|| self.blocks.on_fault(page, window_max))
    }

    /// So many pages of the plan that starts at this address were asked for: the others were there.
    pub(crate) fn brought(&mut self, start: usize, pages: u32) {
        let page = start >> PAGE_SHIFT;
        if let Some(stream) = self.streams.iter_mut().find(|s| s.marker == page && page != 0) {
            stream.brought = pages;
        }
    }

    /// The stream that a fault on the page may go on with.
    fn find(&mut self, page: usize) -> Option<&mut Stream> {
        let distance = |s: &Stream| page.wrapping_sub(s.last).cast_signed();
        let near =
            |s: &&mut Stream| s.tick != 0 && distance(s) != 0 && distance(s).abs() <= STRIDE_MAX;
        let candidates = self.streams.iter_mut().filter(near);
        candidates.min_by_key(|s| (distance(s) != s.stride, distance(s).abs()))
    }

    fn start(&mut self, page: usize) {
        let tick = self.tick;
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|s| s.tick) {
            *oldest = Stream { last: page, tick, ..Stream::default() };
        }
    }
}

/// Where on a stream's path a fault was.
enum Reached {
    /// In the last window.
    Window,
    /// Where that ends, or a little past it.
    End,
    /// Before it, where the program is at work: the page has gone again, or never came.
    Behind,
}

impl Stream {
    /// Whether the page is on the path of what was planned.
    fn reached(&self, page: usize) -> Option<Reached> {
        if self.marker == 0 {
            return None;
        }
        // In pages along the stream's direction.
        let along =
            |from: usize, to: usize| to.wrapping_sub(from).cast_signed() * self.stride.signum();
        let stride = self.stride.unsigned_abs();
        let offset = along(self.marker, page);
        if offset % stride.cast_signed() != 0 {
            return None;
        }
        let end = along(self.marker, self.frontier);
        if (0..end).contains(&offset) {
            return Some(Reached::Window);
        }
        if (end..=end + (SLACK_STRIDES * stride).cast_signed()).contains(&offset) {
            return Some(Reached::End);
        }
        (offset < 0 && along(self.last, page) > 0).then_some(Reached::Behind)
    }

    /// A fault near the last one that no plan has foreseen.
    fn follow(&mut self, page: usize, tick: u64, window_max: u32) -> Option<Plan> {
        let distance = page.wrapping_sub(self.last).cast_signed();
        if distance == self.stride {
            self.confidence = self.confidence.saturating_add(1);
            (self.last, self.tick) = (page, tick);
        } else {
            *self = Self { last: page, stride: distance, confidence: 1, tick, ..Self::default() };
        }
        (self.confidence >= CONFIDENT).then(|| self.advance(page, window_max))
    }

    /// Plans the window after what was asked for so far; the fault was on `page`.
    fn advance(&mut self, page: usize, window_max: u32) -> Plan {
        let used = if self.marker == 0 { 0 } else { std::mem::take(&mut self.brought) };
        let next = page.wrapping_add_signed(self.stride);
        let is_past =
            |s: &Self| next.wrapping_sub(s.frontier).cast_signed() * s.stride.signum() > 0;
        let start = if self.marker == 0 || is_past(self) { next } else { self.frontier };
        self.window = (self.window * 2).clamp(WINDOW_FIRST.min(window_max), window_max);
        self.marker = start;
        let length = self.stride.saturating_mul(self.window as isize);
        self.frontier = start.wrapping_add_signed(length);
        Plan {
            start: start << PAGE_SHIFT,
            step: self.stride << PAGE_SHIFT,
            count: self.window,
            used,
            marked: true,
        }
    }

    /// Plans what is missing between the page and another one ahead.
    fn refill(&self, page: usize, end: usize) -> Option<Plan> {
        let gap = end.wrapping_sub(page).cast_signed() / self.stride - 1;
        let count = u32::try_from(gap).ok().filter(|&count| count > 0)?.min(self.window);
        let start = page.wrapping_add_signed(self.stride) << PAGE_SHIFT;
        let step = self.stride << PAGE_SHIFT;
        Some(Plan { start, step, count, used: 0, marked: false })
    }
}

/// Pages of a block.
const BLOCK_PAGES: usize = 32;
/// Blocks with faults that are remembered; the one idle for longest is replaced.
const BLOCKS_MAX: usize = 16;
/// Faults in a block after which the rest of it is brought.
const DENSE: u8 = 6;
/// Faults after which one in the same block belongs to another story.
const FAULTS_TOGETHER: u64 = 64;
/// Times in a row that blocks are brought at their first fault; then they must be seen to be touched
/// densely again. What is brought in vain would otherwise lead from one end of memory to the other.
const TRUSTED: u8 = 6;

/// Finds memory that is touched densely, if in no order: when faults fall close together again and
/// again, the rest of their aligned block is brought, and where that goes on in the next block,
/// whole blocks at the first fault, twice as many each time.
#[derive(Debug, Default)]
struct Blocks {
    recent: [Block; BLOCKS_MAX],
    tick: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    number: usize,
    faults: u8,
    /// Blocks that were brought from this one on, downwards if negative; 0: none.
    brought: isize,
    /// Times in a row until then that blocks were brought at their first fault.
    trusted: u8,
    tick: u64,
}

impl Block {
    /// What to bring if a fault falls on this block, the next one after what was brought.
    fn next(&self, number: usize) -> Option<isize> {
        if self.trusted >= TRUSTED {
            return None;
        }
        let distance = number.wrapping_sub(self.number).cast_signed();
        match self.brought {
            0 => None,
            // It is not known yet which way it goes.
            1 if distance.abs() == 1 => Some(distance * 2),
            brought => (distance == brought).then_some(brought * 2),
        }
    }
}

impl Blocks {
    fn on_fault(&mut self, page: usize, window_max: u32) -> Option<Plan> {
        self.tick += 1;
        let number = page / BLOCK_PAGES;
        let index = self.recent.iter().position(|b| b.tick != 0 && b.number == number);
        let index = index.unwrap_or_else(|| {
            let idle = (0..BLOCKS_MAX).min_by_key(|&at| self.recent[at].tick).unwrap_or(0);
            self.recent[idle] = Block { number, ..Block::default() };
            idle
        });
        let most = (window_max as usize / BLOCK_PAGES).max(1).cast_signed();
        let next = |b: &Block| Some((b.next(number)?, b.trusted + 1));
        let follows = self.recent.iter().filter(|b| b.tick != 0).find_map(next);
        let block = &mut self.recent[index];
        if self.tick - block.tick > FAULTS_TOGETHER {
            *block = Block { number, ..Block::default() };
        }
        let first = block.faults == 0;
        block.tick = self.tick;
        block.faults += 1;
        let (blocks, trusted) = match follows.filter(|_| first) {
            Some((blocks, trusted)) => (blocks.clamp(-most, most), trusted),
            None if block.faults < DENSE => return None,
            None => (1, 0),
        };
        // If the block has gone again it can be brought again.
        (block.brought, block.trusted, block.faults) = (blocks, trusted, 1);
        let start = if blocks < 0 { number.wrapping_add_signed(blocks + 1) } else { number };
        let pages = u32::try_from(BLOCK_PAGES * blocks.unsigned_abs()).unwrap_or(window_max);
        Some(Plan {
            start: (start * BLOCK_PAGES) << PAGE_SHIFT,
            step: 1 << PAGE_SHIFT,
            count: pages.min(window_max),
            used: 0,
            marked: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds the faults that a program with these accesses would cause, given that planned pages
    /// but the markers are there; returns how many faults it takes.
    fn faults(pages: impl Iterator<Item = usize>, streams: &mut Streams) -> usize {
        faults_and_plans(pages, streams).0
    }

    /// Returns how many pages were planned, too.
    fn faults_and_plans(
        pages: impl Iterator<Item = usize>,
        streams: &mut Streams,
    ) -> (usize, usize) {
        let mut planned = 0;
        let mut there = std::collections::HashSet::new();
        let mut markers = std::collections::HashSet::new();
        let mut count = 0;
        for page in pages {
            if there.contains(&page) {
                continue;
            }
            count += 1;
            there.insert(page);
            let brought = markers.remove(&page);
            if let Some(plan) = streams.on_fault(page << PAGE_SHIFT, brought) {
                planned += plan.count as usize;
                let marker = usize::from(plan.marked);
                markers.extend(plan.addresses().take(marker).map(|a| a >> PAGE_SHIFT));
                there.extend(plan.addresses().skip(marker).map(|a| a >> PAGE_SHIFT));
            }
        }
        (count, planned)
    }

    #[test]
    fn a_sequence_costs_about_one_fault_a_window() {
        let count = faults(1000..11000, &mut Streams::new(128));
        assert!(count < 10000 / 128 + 12, "{count}");
    }

    #[test]
    fn strides_and_backward_sequences_are_recognised() {
        let count = faults((0..5000).map(|i| 1000 + i * 5), &mut Streams::new(64));
        assert!(count < 5000 / 64 + 12, "{count}");
        let count = faults((0..5000).map(|i| 100_000 - i), &mut Streams::new(64));
        assert!(count < 5000 / 64 + 12, "{count}");
    }

    #[test]
    fn three_interleaved_sequences_are_told_apart() {
        let pages = (0..3000).map(|i| 1000 + (i % 3) * 1_000_000 + i / 3);
        let count = faults(pages, &mut Streams::new(64));
        assert!(count < 3000 / 64 + 40, "{count}");
    }

    #[test]
    fn random_faults_plan_nothing() {
        let mut streams = Streams::new(128);
        let mut state = 7u64;
        let mut planned = 0;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = (state >> 33) as usize % 262_144;
            planned += usize::from(streams.on_fault((page + 10) << PAGE_SHIFT, false).is_some());
        }
        assert!(planned < 20, "{planned}");
    }

    #[test]
    fn a_window_of_zero_switches_it_off() {
        let mut streams = Streams::new(0);
        assert!((1..100).all(|page| streams.on_fault(page << PAGE_SHIFT, false).is_none()));
    }

    #[test]
    fn a_stream_goes_on_over_pages_that_are_there() {
        let mut streams = Streams::new(128);
        let resident = |page: usize| page % 37 < 2;
        let mut there = std::collections::HashSet::new();
        let mut marker = None;
        let mut count = 0;
        for page in (1000..11_000).filter(|&page| !resident(page)) {
            if there.contains(&page) {
                continue;
            }
            count += 1;
            if let Some(plan) = streams.on_fault(page << PAGE_SHIFT, Some(page) == marker) {
                let pages: Vec<_> = plan.addresses().map(|a| a >> PAGE_SHIFT).collect();
                marker = pages.iter().copied().find(|&page| !resident(page) && plan.marked);
                there.extend(pages.into_iter().filter(|&page| Some(page) != marker));
            }
        }
        assert!(count < 10_000 / 128 + 20, "{count}");
    }

    #[test]
    fn a_page_that_has_gone_again_does_not_end_the_stream() {
        let mut streams = Streams::new(64);
        for page in 1000..1003 {
            streams.on_fault(page << PAGE_SHIFT, false);
        }
        let plan = streams.on_fault(1003 << PAGE_SHIFT, true).unwrap();
        assert_eq!((plan.start >> PAGE_SHIFT, plan.count, plan.marked), (1011, 16, true));
        let lost = streams.on_fault(1006 << PAGE_SHIFT, false).unwrap();
        assert_eq!((lost.start >> PAGE_SHIFT, lost.count, lost.marked), (1007, 4, false));
        let plan = streams.on_fault(1011 << PAGE_SHIFT, true).unwrap();
        assert_eq!((plan.start >> PAGE_SHIFT, plan.count), (1027, 32));
    }

    #[test]
    fn only_what_was_brought_counts_as_used() {
        let mut streams = Streams::new(64);
        for page in 1000..1002 {
            streams.on_fault(page << PAGE_SHIFT, false);
        }
        let plan = streams.on_fault(1002 << PAGE_SHIFT, false).unwrap();
        streams.brought(plan.start, 3);
        assert_eq!(streams.on_fault(plan.start, true).unwrap().used, 3);
    }

    /// A first pass began at the same place: its faults there are of another story.
    #[test]
    fn blocks_do_not_take_over_from_strides() {
        let passes = (0..5).flat_map(|from| (0..20_000).map(move |i| 1000 + from + i * 5));
        let (_, planned) = faults_and_plans(passes, &mut Streams::new(256));
        assert!(planned < 105_000, "{planned} pages for 100,000 accesses");
    }

    /// Two sequences, of which each leaves every second page to the other one, with some jitter.
    #[test]
    fn what_is_touched_densely_in_no_order_is_brought_by_blocks() {
        let jitter = |i: usize| i.wrapping_mul(0x9E37_79B9) >> 7 & 7;
        let forward = (0..5000).map(|i| 10_000 + i + jitter(i));
        let count = faults(forward, &mut Streams::new(256));
        assert!(count < 5000 / 20, "{count}");
        let backward = (0..5000).map(|i| 90_000 - i + jitter(i));
        let count = faults(backward, &mut Streams::new(256));
        assert!(count < 5000 / 20, "{count}");
    }
}
