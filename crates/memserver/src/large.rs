//! Portions of several pages (64 KiB or 2 MiB): one entry each, and beside it, packed, what differs
//! from page to page.
//!
//! ```text
//! entry:   | heat, generation, dirty | pages |
//!
//! few:     | page, version, checksum, spot | ...            24 bytes for each page that is there
//! many:    | checksum | checksum | ...                       8 bytes a page
//!          | version  | or one for all |                     8 bytes a page, or 8 in all
//!          | spot     | or a run of slots |                  5 bytes a page, or 4 in all
//! ```
//!
//! Checksums stay one for each 4 KiB, because that is what clients write and read, and what is checked
//! on the way from the one to the other. What a portion is, it is as a whole: dirty, hot, newer than a
//! copy. Where its pages lie may differ: those that do not get smaller are not compressed, and each
//! page that is written gets a slot of its own, so that who is being sent the former one is not
//! disturbed.

use std::ops::Range;
use std::sync::Arc;

use farmem_region::{Checksum, Version};
use farmem_vmem::Arena;

use crate::journal::Spot;
use crate::table::{LEAF_PAGES, Portion};
use crate::tiers::Place;

/// The most that a portion is hot: it has many pages, and is asked for as often merely by being read
/// once. It cools down in two passes of the hand.
const HEAT_MAX: u8 = 3;
/// Of a portion's pages, in quarters: more are there than this, and they lie side by side.
const MANY_QUARTERS: usize = 3;

const WORDS: usize = LEAF_PAGES / u64::BITS as usize;

/// The portions of a leaf that consist of several pages.
#[derive(Debug)]
pub(crate) struct Large {
    /// Whose slots they are.
    arena: Arc<Arena>,
    /// Pages of a portion.
    unit: usize,
    /// In their order, with their number in the leaf.
    entries: Vec<(u16, Entry)>,
}

/// What is known of a portion.
#[derive(Debug)]
struct Entry {
    heat: u8,
    generation: u16,
    dirty: Dirty,
    pages: Pages,
}

/// Whether a portion differs from its file. Whoever writes any page of it makes all of it dirty;
/// writing back makes its pages clean one after the other.
#[derive(Debug, Clone)]
enum Dirty {
    None,
    All,
    /// Those whose bits are set still are.
    Some(Box<[u64; WORDS]>),
}

#[derive(Debug)]
enum Pages {
    Few(Vec<Page>),
    Many(Box<Many>),
}

/// A page that is there.
#[derive(Debug, Clone, Copy)]
struct Page {
    version: u64,
    checksum: u64,
    number: u32,
    /// In the portion.
    at: u16,
    mark: Mark,
}

const _: () = assert!(size_of::<Page>() <= 24);

/// Which kind of place `Page::number` is a number of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark(u8);

impl Mark {
    pub(crate) const ABSENT: Self = Self(0);
    const DRAM: Self = Self(1);
    const FILE: Self = Self(2);
    /// The first position on a shelf; there are 64 at most.
    const COMPRESSED: u8 = 3;

    /// A place in a number and a mark.
    pub(crate) const fn of(spot: Spot) -> (u32, Self) {
        match spot {
            Spot::Dram(slot) => (slot, Self::DRAM),
            Spot::File(place) => (place, Self::FILE),
            Spot::Compressed { shelf, at } => (shelf, Self(Self::COMPRESSED.saturating_add(at))),
        }
    }

    /// The place of that number, unless it is none.
    pub(crate) const fn spot(self, number: u32) -> Option<Spot> {
        match self {
            Self::ABSENT => None,
            Self::DRAM => Some(Spot::Dram(number)),
            Self::FILE => Some(Spot::File(number)),
            Self(mark) => Some(Spot::Compressed { shelf: number, at: mark - Self::COMPRESSED }),
        }
    }
}

/// Most of a portion's pages, or all.
#[derive(Debug)]
struct Many {
    versions: Versions,
    spots: Spots,
    checksums: Box<[u64]>,
    /// Pages that are there.
    count: usize,
}

#[derive(Debug)]
enum Versions {
    One(u64),
    Each(Box<[u64]>),
}

#[derive(Debug)]
enum Spots {
    /// All pages are in dram, side by side from this slot on.
    Run(u32),
    Each {
        numbers: Box<[u32]>,
        marks: Box<[Mark]>,
    },
}

impl Large {
    /// Portions of so many pages.
    pub(crate) const fn new(arena: Arc<Arena>, unit: usize) -> Self {
        Self { arena, unit, entries: Vec::new() }
    }

    /// A page, if it is there. What is returned is the token that the entry holds: it is only to be
    /// looked at.
    pub(crate) fn get(&self, at: usize) -> Option<Portion> {
        let (number, within) = self.split(at);
        let entry = &self.entries[self.find(number).ok()?].1;
        entry.pages.get(within).map(|page| entry.portion(&self.arena, page))
    }

    /// As [`Large::get`]; what is changed of it is kept.
    pub(crate) fn with<T>(&mut self, at: usize, look: impl FnOnce(&mut Portion) -> T) -> Option<T> {
        let (number, within) = self.split(at);
        let index = self.find(number).ok()?;
        let entry = &mut self.entries[index].1;
        let page = entry.pages.get(within)?;
        let mut portion = entry.portion(&self.arena, page);
        let (was_dirty, spot) = (portion.dirty != 0, portion.place.spot());
        let result = look(&mut portion);
        entry.heat = portion.heat.min(HEAT_MAX);
        match (was_dirty, portion.dirty != 0) {
            (true, false) => entry.dirty.clean(within, self.unit),
            (false, true) => entry.dirty = Dirty::All,
            _ => {}
        }
        if portion.place.spot() != spot {
            entry.pages.put(page_of(within, &portion), self.unit);
        }
        Some(result)
    }

    /// Puts a page in, whose token is the entry's then; returns the former one.
    pub(crate) fn replace(&mut self, at: usize, portion: &Portion) -> Option<Portion> {
        let (number, within) = self.split(at);
        let index = self.find(number).unwrap_or_else(|index| {
            if self.entries.len() == self.entries.capacity() {
                self.entries.reserve_exact(self.entries.len().max(1));
            }
            self.entries.insert(index, (number, Entry::empty()));
            index
        });
        let entry = &mut self.entries[index].1;
        let former = entry.pages.get(within).map(|page| entry.portion(&self.arena, page));
        entry.heat = entry.heat.max(portion.heat);
        entry.generation = entry.generation.max(portion.generation);
        if portion.dirty != 0 {
            entry.dirty = Dirty::All;
        }
        entry.pages.put(page_of(within, portion), self.unit);
        former
    }

    /// Takes the pages of a range out.
    pub(crate) fn take(&mut self, within: Range<usize>, mut taken: impl FnMut(Portion)) {
        let unit = self.unit;
        for (number, entry) in &mut self.entries {
            let first = usize::from(*number) * unit;
            let (start, end) = (within.start.max(first), within.end.min(first + unit));
            for at in start..end {
                let Some(page) = entry.pages.get(at - first) else { continue };
                taken(entry.portion(&self.arena, page));
                entry.pages.remove(at - first);
            }
        }
        self.entries.retain(|(_, entry)| entry.pages.count() > 0);
        self.entries.shrink_to_fit();
    }

    /// Those there are, with their places in the leaf, in their order, as [`Large::get`].
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, Portion)> + '_ {
        self.entries.iter().flat_map(move |(number, entry)| {
            let first = usize::from(*number) * self.unit;
            let place = move |page: &Page| first + usize::from(page.at);
            entry.pages.iter().map(move |page| (place(&page), entry.portion(&self.arena, page)))
        })
    }

    /// Shows each portion: its pages, and how hot it is, which is to be returned.
    pub(crate) fn each(&mut self, mut show: impl FnMut(&[(usize, Portion)], u8) -> u8) {
        let mut shown = Vec::new();
        for (number, entry) in &mut self.entries {
            let first = usize::from(*number) * self.unit;
            for page in entry.pages.iter() {
                let portion = entry.portion(&self.arena, page);
                shown.push((first + usize::from(page.at), portion));
            }
            entry.heat = show(&shown, entry.heat);
            shown.clear();
        }
    }

    /// As many of them as of another leaf's, each made from the other's.
    pub(crate) fn map(&self, mut copy: impl FnMut(&Portion) -> Portion) -> Self {
        let entries = self.entries.iter().map(|(number, entry)| {
            let pages = match &entry.pages {
                Pages::Few(few) => {
                    Pages::Few(few.iter().map(|page| entry.copy(self, *page, &mut copy)).collect())
                }
                Pages::Many(many) => {
                    for page in entry.pages.iter() {
                        entry.copy(self, page, &mut copy);
                    }
                    Pages::Many(Box::new(many.clone_spots()))
                }
            };
            let Entry { heat, generation, .. } = *entry;
            (*number, Entry { heat, generation, dirty: entry.dirty.clone(), pages })
        });
        Self { arena: Arc::clone(&self.arena), unit: self.unit, entries: entries.collect() }
    }

    /// Bytes that they take, beside this struct.
    pub(crate) fn bytes(&self) -> usize {
        let entries = self.entries.iter().map(|(_, entry)| {
            let dirty = if matches!(entry.dirty, Dirty::Some(_)) { WORDS * 8 } else { 0 };
            dirty + entry.pages.bytes()
        });
        self.entries.capacity() * size_of::<(u16, Entry)>() + entries.sum::<usize>()
    }

    /// All pages, which the caller answers for from now on.
    pub(crate) fn into_iter(self) -> impl Iterator<Item = Portion> {
        let Self { arena, entries, .. } = self;
        entries.into_iter().flat_map(move |(_, entry)| {
            let pages: Vec<Portion> =
                entry.pages.iter().map(|page| entry.portion(&arena, page)).collect();
            pages
        })
    }

    const fn split(&self, at: usize) -> (u16, usize) {
        // A leaf has 512 pages.
        ((at / self.unit) as u16, at % self.unit)
    }

    fn find(&self, number: u16) -> Result<usize, usize> {
        self.entries.binary_search_by_key(&number, |(number, _)| *number)
    }
}

impl Entry {
    const fn empty() -> Self {
        Self { heat: 0, generation: 0, dirty: Dirty::None, pages: Pages::Few(Vec::new()) }
    }

    fn portion(&self, arena: &Arena, page: Page) -> Portion {
        Portion {
            place: Place::adopt(arena, page.spot()).expect("it was given by this arena"),
            dirty: if self.dirty.contains(page.at) { u8::MAX } else { 0 },
            heat: self.heat,
            absent: 0,
            generation: self.generation,
            version: Version::new(page.version),
            checksum: Checksum::new(page.checksum),
        }
    }

    /// Takes a second token for a page. It is for the same place, so that it is the same page.
    fn copy(&self, of: &Large, page: Page, copy: &mut impl FnMut(&Portion) -> Portion) -> Page {
        let copied = page_of(page.at.into(), &copy(&self.portion(&of.arena, page)));
        debug_assert_eq!((copied.number, copied.mark), (page.number, page.mark));
        copied
    }
}

impl Dirty {
    fn contains(&self, at: u16) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Some(bits) => bits[usize::from(at) / 64] & 1 << (at % 64) != 0,
        }
    }

    /// A page is clean.
    fn clean(&mut self, at: usize, unit: usize) {
        if let Self::All = self {
            let mut bits = Box::new([0; WORDS]);
            (0..unit).for_each(|at| bits[at / 64] |= 1 << (at % 64));
            *self = Self::Some(bits);
        }
        if let Self::Some(bits) = self {
            bits[at / 64] &= !(1 << (at % 64));
            if **bits == [0; WORDS] {
                *self = Self::None;
            }
        }
    }
}

impl Page {
    fn spot(&self) -> Spot {
        self.mark.spot(self.number).expect("an absent page has no spot")
    }
}

fn page_of(at: usize, portion: &Portion) -> Page {
    let (number, mark) = Mark::of(portion.place.spot());
    let (version, checksum) = (portion.version.get(), portion.checksum.get());
    Page { version, checksum, number, at: at as u16, mark }
}

impl Pages {
    fn count(&self) -> usize {
        match self {
            Self::Few(few) => few.len(),
            Self::Many(many) => many.count,
        }
    }

    fn get(&self, at: usize) -> Option<Page> {
        match self {
            Self::Few(few) => find(few, at).ok().map(|index| few[index]),
            Self::Many(many) => many.get(at),
        }
    }

    fn iter(&self) -> impl Iterator<Item = Page> + '_ {
        let (few, many) = match self {
            Self::Few(few) => (Some(few.iter().copied()), None),
            Self::Many(many) => (None, Some(many.iter())),
        };
        few.into_iter().flatten().chain(many.into_iter().flatten())
    }

    fn put(&mut self, page: Page, unit: usize) {
        let few = match self {
            Self::Many(many) => return many.put(page),
            Self::Few(few) => few,
        };
        match find(few, page.at.into()) {
            Ok(index) => few[index] = page,
            Err(index) => {
                if few.len() == few.capacity() {
                    // A vector would begin with room for four, and double.
                    few.reserve_exact((few.len() / 4).max(1));
                }
                few.insert(index, page);
            }
        }
        if few.len() * 4 > unit * MANY_QUARTERS {
            *self = Self::Many(Box::new(Many::of(few, unit)));
        }
    }

    fn remove(&mut self, at: usize) {
        match self {
            Self::Few(few) => {
                if let Ok(index) = find(few, at) {
                    few.remove(index);
                }
            }
            Self::Many(many) => many.remove(at),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Few(few) => few.capacity() * size_of::<Page>(),
            Self::Many(many) => many.bytes(),
        }
    }
}

/// Where a page is among few, or would be.
fn find(few: &[Page], at: usize) -> Result<usize, usize> {
    few.binary_search_by_key(&at, |page| page.at.into())
}

impl Many {
    fn of(few: &[Page], unit: usize) -> Self {
        let mut numbers = vec![0; unit].into_boxed_slice();
        let mut marks = vec![Mark::ABSENT; unit].into_boxed_slice();
        let mut checksums = vec![0; unit].into_boxed_slice();
        for page in few {
            let at = usize::from(page.at);
            (numbers[at], marks[at], checksums[at]) = (page.number, page.mark, page.checksum);
        }
        let mut versions = Versions::One(few.first().map_or(0, |page| page.version));
        few.iter().for_each(|page| versions.put(page.at.into(), page.version, unit));
        Self { versions, spots: Spots::Each { numbers, marks }, checksums, count: few.len() }
    }

    fn get(&self, at: usize) -> Option<Page> {
        let (number, mark) = match &self.spots {
            // A leaf has 512 pages.
            Spots::Run(first) => (first + at as u32, Mark::DRAM),
            Spots::Each { numbers, marks } => (numbers[at], marks[at]),
        };
        let version = match &self.versions {
            Versions::One(version) => *version,
            Versions::Each(versions) => versions[at],
        };
        let page = Page { version, checksum: self.checksums[at], number, at: at as u16, mark };
        (mark != Mark::ABSENT).then_some(page)
    }

    fn iter(&self) -> impl Iterator<Item = Page> + '_ {
        (0..self.checksums.len()).filter_map(|at| self.get(at))
    }

    fn put(&mut self, page: Page) {
        let (at, unit) = (usize::from(page.at), self.checksums.len());
        let is_new = self.get(at).is_none();
        self.checksums[at] = page.checksum;
        self.versions.put(at, page.version, unit);
        let (numbers, marks) = self.each_spot();
        (numbers[at], marks[at]) = (page.number, page.mark);
        self.count += usize::from(is_new);
        if is_new && self.count == unit {
            self.gather();
        }
    }

    fn remove(&mut self, at: usize) {
        let was_there = self.get(at).is_some();
        let (_, marks) = self.each_spot();
        marks[at] = Mark::ABSENT;
        self.count -= usize::from(was_there);
    }

    /// Says in a word where all pages are, if they lie side by side.
    fn gather(&mut self) {
        if let Spots::Each { numbers, marks } = &self.spots
            && marks.iter().all(|mark| *mark == Mark::DRAM)
            && (numbers[0]..).zip(numbers).all(|(next, number)| next == *number)
        {
            self.spots = Spots::Run(numbers[0]);
        }
    }

    fn each_spot(&mut self) -> (&mut [u32], &mut [Mark]) {
        let unit = self.checksums.len();
        if let Spots::Run(first) = self.spots {
            let numbers = (first..).take(unit).collect();
            let marks = vec![Mark::DRAM; unit].into_boxed_slice();
            self.spots = Spots::Each { numbers, marks };
        }
        match &mut self.spots {
            Spots::Each { numbers, marks } => (numbers, marks),
            Spots::Run(_) => unreachable!("it was made one for each"),
        }
    }

    /// The same; the caller takes the tokens.
    fn clone_spots(&self) -> Self {
        let versions = match &self.versions {
            Versions::One(version) => Versions::One(*version),
            Versions::Each(versions) => Versions::Each(versions.clone()),
        };
        let spots = match &self.spots {
            Spots::Run(first) => Spots::Run(*first),
            Spots::Each { numbers, marks } => {
                Spots::Each { numbers: numbers.clone(), marks: marks.clone() }
            }
        };
        Self { versions, spots, checksums: self.checksums.clone(), count: self.count }
    }

    fn bytes(&self) -> usize {
        let unit = self.checksums.len();
        let versions = if matches!(self.versions, Versions::One(_)) { 0 } else { unit * 8 };
        let spots = if matches!(self.spots, Spots::Run(_)) { 0 } else { unit * 5 };
        size_of::<Self>() + unit * 8 + versions + spots
    }
}

impl Versions {
    fn put(&mut self, at: usize, version: u64, unit: usize) {
        if let Self::One(all) = self
            && *all != version
        {
            *self = Self::Each(vec![*all; unit].into_boxed_slice());
        }
        if let Self::Each(versions) = self {
            versions[at] = version;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::Tiers;

    /// A page in a slot, or in another tier that nobody looks into here.
    fn portion(tiers: &Tiers, spot: Spot, version: u64, dirty: u8) -> Portion {
        Portion {
            place: Place::adopt(&tiers.arena, spot).unwrap(),
            dirty,
            heat: 1,
            absent: 0,
            generation: 7,
            version: Version::new(version),
            checksum: Checksum::new(version * 3),
        }
    }

    type Model = [Option<(Spot, u64, bool)>; LEAF_PAGES];

    /// Compares all that is there; so it is in a copy.
    fn agree(tiers: &Tiers, large: &Large, model: &Model) {
        let told = |portion: &Portion| {
            assert_eq!(portion.checksum.get(), portion.version.get() * 3);
            (portion.place.spot(), portion.version.get(), portion.dirty != 0)
        };
        let all = |large: &Large| -> Vec<_> {
            large.iter().map(|(at, page)| (at, told(&page))).collect()
        };
        let expected: Vec<_> =
            (0..).zip(model).filter_map(|(at, page)| Some((at, (*page)?))).collect();
        assert_eq!(all(large), expected);
        let copy = |page: &Portion| {
            let place = Place::adopt(&tiers.arena, page.place.spot()).unwrap();
            Portion { place, ..*page }
        };
        assert_eq!(all(&large.map(copy)), expected);
    }

    #[test]
    fn cap_72_large_portions_agree_with_one_option_for_each_page() {
        let tiers = Tiers::dram_only(4096).unwrap();
        let mut seed = 42_u64;
        let mut next = |limit: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % limit
        };
        for unit in [16, LEAF_PAGES] {
            let mut large = Large::new(Arc::clone(&tiers.arena), unit);
            let mut model: Model = [None; LEAF_PAGES];
            for step in 0..8_000 {
                let at = next(512) as usize;
                let count = if step % 200 == 0 { 512 } else { 1 + next(8) as usize };
                let end = (at + count).min(512);
                let portion_of = |at: usize| at / unit * unit..(at / unit + 1) * unit;
                match next(8) {
                    0..4 => {
                        let spot = match next(8) {
                            0 => Spot::File(step as u32),
                            1 => Spot::Compressed { shelf: step as u32, at: 63 },
                            _ => Spot::Dram(step as u32 % 4096),
                        };
                        let dirty = next(4) == 0;
                        let made = portion(&tiers, spot, step, u8::from(dirty));
                        let former = large.replace(at, &made);
                        let former =
                            former.map(|former| (former.place.spot(), former.version.get()));
                        assert_eq!(former, model[at].map(|(spot, version, _)| (spot, version)));
                        // One that is put in clean is dirty if all of its portion is.
                        model[at] = Some((spot, step, dirty || large.get(at).unwrap().dirty != 0));
                        // All of a portion is dirty as soon as one page is written.
                        if dirty {
                            portion_of(at).for_each(|at| {
                                model[at].iter_mut().for_each(|page| page.2 = true);
                            });
                        }
                    }
                    4 => {
                        for (at, page) in (at..).zip(&mut model[at..end]) {
                            let there = large.with(at, |portion| portion.dirty = 0);
                            assert_eq!(there.is_some(), page.is_some());
                            page.iter_mut().for_each(|page| page.2 = false);
                        }
                    }
                    5 => {
                        let moved = Spot::File(step as u32);
                        let there = large.with(at, |portion| {
                            portion.place = Place::adopt(&tiers.arena, moved).unwrap();
                        });
                        assert_eq!(there.is_some(), model[at].is_some());
                        model[at].iter_mut().for_each(|page| page.0 = moved);
                    }
                    _ => {
                        let mut taken = Vec::new();
                        large.take(at..end, |portion| taken.push(portion.version.get()));
                        let expected: Vec<u64> = model[at..end]
                            .iter_mut()
                            .filter_map(Option::take)
                            .map(|p| p.1)
                            .collect();
                        assert_eq!(taken, expected);
                    }
                }
                if step % 50 == 0 {
                    agree(&tiers, &large, &model);
                }
            }
        }
    }

    #[test]
    fn cap_72_a_portion_that_is_made_as_a_whole_takes_a_quarter_of_its_pages_entries() {
        let tiers = Tiers::dram_only(4096).unwrap();
        for unit in [16, LEAF_PAGES] {
            let mut large = Large::new(Arc::clone(&tiers.arena), unit);
            for at in 0..unit {
                large.replace(at, &portion(&tiers, Spot::Dram(1024 + at as u32), 0, 0));
            }
            assert!(large.bytes() <= unit * 8 + 160, "{unit}: {}", large.bytes());
            // Written page by page, each elsewhere and in a version of its own.
            for at in 0..unit {
                large.replace(at, &portion(&tiers, Spot::Dram(4000 - at as u32), at as u64, 0));
            }
            assert!(large.bytes() <= unit * 21 + 160, "{unit}: {}", large.bytes());
            large.take(0..unit, |_| ());
            assert_eq!(large.bytes(), 0);
            // Single pages cost no more than they do elsewhere.
            large.replace(3, &portion(&tiers, Spot::Dram(1), 1, 0));
            assert!(large.bytes() <= 100, "{}", large.bytes());
        }
    }
}
