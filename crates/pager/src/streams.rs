//! Read-ahead: guesses from the faults so far which pages a program will touch next.
//!
//! A *stream* is a sequence of faults at a constant distance: 1 page (sequential), several, or
//! backwards. When a stream is recognised, pages ahead of it are fetched in windows that double
//! up to a limit. The first page of each window is a *marker*: it is brought in but not yet
//! installed, so that the program's arrival there is seen (without network) and the next window
//! is asked for while the program works on this one.

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

/// Pages to bring in because a fault suggests that they come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Address of the first page to bring in.
    pub(crate) start: usize,
    /// Distance from one page to the next in bytes; may be negative.
    pub(crate) step: isize,
    /// Number of pages.
    pub(crate) count: u32,
    /// Pages of the stream's window before that the program has thereby been seen to use.
    pub(crate) used: u32,
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
    /// Where the last plan started: the marker. 0: none.
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
    tick: u64,
    window_max: u32,
}

impl Streams {
    /// Windows grow up to `window_max` pages; 0 switches read-ahead off.
    #[must_use]
    pub(crate) fn new(window_max: u32) -> Self {
        Self { streams: [Stream::default(); STREAMS_MAX], tick: 0, window_max }
    }

    /// Takes note of a fault and says what to bring in besides the page itself.
    pub(crate) fn on_fault(&mut self, address: usize) -> Option<Plan> {
        if self.window_max == 0 {
            return None;
        }
        self.tick += 1;
        let page = address >> PAGE_SHIFT;
        let Some(at) = self.find(page) else {
            self.start(page);
            return None;
        };
        let (tick, window_max) = (self.tick, self.window_max);
        let stream = &mut self.streams[at];
        stream.tick = tick;
        if stream.marker != 0 && (page == stream.marker || page == stream.frontier) {
            stream.last = page;
            return Some(stream.advance(page, window_max));
        }
        let distance = page.wrapping_sub(stream.last).cast_signed();
        stream.last = page;
        if distance == stream.stride {
            stream.confidence = stream.confidence.saturating_add(1);
        } else {
            *stream = Stream { last: page, stride: distance, confidence: 1, tick, ..*stream };
            stream.marker = 0;
            stream.window = 0;
        }
        (stream.confidence >= CONFIDENT).then(|| stream.advance(page, window_max))
    }

    /// The stream to which a fault on the page belongs.
    fn find(&self, page: usize) -> Option<usize> {
        let exact = |s: &Stream| s.marker != 0 && (page == s.marker || page == s.frontier);
        let near = |s: &Stream| {
            let distance = page.wrapping_sub(s.last).cast_signed();
            s.tick != 0 && distance != 0 && distance.abs() <= STRIDE_MAX
        };
        self.streams.iter().position(exact).or_else(|| {
            let candidates = self.streams.iter().enumerate().filter(|(_, s)| near(s));
            let closest = candidates.min_by_key(|(_, s)| {
                let distance = page.wrapping_sub(s.last).cast_signed();
                (distance != s.stride, distance.abs())
            });
            closest.map(|(at, _)| at)
        })
    }

    fn start(&mut self, page: usize) {
        let tick = self.tick;
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|s| s.tick) {
            *oldest = Stream { last: page, tick, ..Stream::default() };
        }
    }
}

impl Stream {
    /// Plans the window after what was asked for so far; the fault was on `page`.
    fn advance(&mut self, page: usize, window_max: u32) -> Plan {
        let used = if self.marker == 0 { 0 } else { self.window };
        let start = if self.marker != 0 && page == self.marker {
            self.frontier
        } else {
            page.wrapping_add_signed(self.stride)
        };
        self.window = (self.window * 2).clamp(WINDOW_FIRST.min(window_max), window_max);
        self.marker = start;
        let length = self.stride.saturating_mul(self.window as isize);
        self.frontier = start.wrapping_add_signed(length);
        Plan {
            start: start << PAGE_SHIFT,
            step: self.stride << PAGE_SHIFT,
            count: self.window,
            used,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds the faults that a program with these accesses would cause, given that planned pages
    /// but the markers are there; returns how many faults it takes.
    fn faults(pages: impl Iterator<Item = usize>, streams: &mut Streams) -> usize {
        let mut there = std::collections::HashSet::new();
        let mut count = 0;
        for page in pages {
            if there.contains(&page) {
                continue;
            }
            count += 1;
            there.insert(page);
            if let Some(plan) = streams.on_fault(page << PAGE_SHIFT) {
                there.extend(plan.addresses().skip(1).map(|a| a >> PAGE_SHIFT));
            }
        }
        count
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
            planned += usize::from(streams.on_fault((page + 10) << PAGE_SHIFT).is_some());
        }
        assert!(planned < 20, "{planned}");
    }

    #[test]
    fn a_window_of_zero_switches_it_off() {
        let mut streams = Streams::new(0);
        assert!((1..100).all(|page| streams.on_fault(page << PAGE_SHIFT).is_none()));
    }
}
