//! In which tier pages of a region are to be kept: ranges that have a preference. Where there is
//! none, a page lies where its use puts it.

use farmem_region::{PageCount, PageIndex, PageRange};
use farmem_wire::Tier;

/// Ranges of one region that may have a preference, so that who tells it page by page takes no more than 24 KiB.
pub(crate) const RANGES_MAX: usize = 1024;

/// Ranges with a preference: apart, in order.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Preferences {
    ranges: Vec<(u64, u64, Tier)>,
}

impl Preferences {
    /// What a page prefers.
    pub(crate) fn of(&self, page: PageIndex) -> Option<Tier> {
        let after = self.ranges.partition_point(|(start, ..)| *start <= page.get());
        let (_, end, tier) = self.ranges.get(after.checked_sub(1)?)?;
        (page.get() < *end).then_some(*tier)
    }

    /// Whether any page is to leave dram, however much room there is.
    pub(crate) fn has_slower(&self) -> bool {
        self.ranges.iter().any(|(.., tier)| *tier != Tier::Dram)
    }

    /// How many pages prefer each tier.
    pub(crate) fn pages(&self) -> [PageCount; 3] {
        Tier::ALL.map(|tier| {
            let of_it = self.ranges.iter().filter(|(.., other)| *other == tier);
            PageCount::new(of_it.map(|(start, end, _)| end - start).sum())
        })
    }

    /// How many there are.
    pub(crate) const fn len(&self) -> usize {
        self.ranges.len()
    }

    pub(crate) fn ranges(&self) -> impl Iterator<Item = (PageRange, Tier)> {
        self.ranges.iter().map(|(start, end, tier)| {
            let (start, count) = (PageIndex::new(*start), PageCount::new(end - start));
            (PageRange { start, count }, *tier)
        })
    }

    /// Sets what the pages of a range prefer.
    pub(crate) fn set(&mut self, range: PageRange, tier: Option<Tier>) {
        let start = range.start.get();
        let end = start.saturating_add(range.count.get());
        if start == end {
            return;
        }
        let mut ranges = Vec::with_capacity(self.ranges.len() + 2);
        for (first, last, other) in std::mem::take(&mut self.ranges) {
            let parts = [(first, last.min(start), other), (first.max(end), last, other)];
            ranges.extend(parts.into_iter().filter(|(first, last, _)| first < last));
        }
        let at = ranges.partition_point(|(first, ..)| *first < start);
        ranges.splice(at..at, tier.map(|tier| (start, end, tier)));
        // Those that touch and agree become one, so that few are looked at.
        for (first, last, tier) in ranges {
            match self.ranges.last_mut() {
                Some(former) if former.1 == first && former.2 == tier => former.1 = last,
                _ => self.ranges.push((first, last, tier)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cap_94_preferences_agree_with_one_for_each_page() {
        let mut seed = 42_u64;
        let mut next = |limit: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % limit
        };
        let tiers = [None, Some(Tier::Dram), Some(Tier::Compressed), Some(Tier::File)];
        for _ in 0..200 {
            let (mut preferences, mut model) = (Preferences::default(), [None; 100]);
            for _ in 0..30 {
                let start = next(100);
                let count = next(30).min(100 - start);
                let range =
                    PageRange { start: PageIndex::new(start), count: PageCount::new(count) };
                let tier = tiers[next(4) as usize];
                preferences.set(range, tier);
                model[start as usize..(start + count) as usize].fill(tier);
                let found: Vec<_> =
                    (0..101).map(|page| preferences.of(PageIndex::new(page))).collect();
                assert_eq!(found[..100], model);
                assert_eq!(found[100], None);
                let counts = Tier::ALL.map(|tier| {
                    let those = model.iter().filter(|other| **other == Some(tier));
                    PageCount::new(those.count() as u64)
                });
                assert_eq!(preferences.pages(), counts);
                let mut again = Preferences::default();
                preferences.ranges().for_each(|(range, tier)| again.set(range, Some(tier)));
                assert_eq!(again, preferences);
            }
        }
    }
}
