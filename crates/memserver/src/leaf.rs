//! 2 MiB of a region: its portions, of which there may be few or all.
//!
//! ```text
//! few:   | 3, portion | 77, portion | ...      in their order, 28 bytes each
//! all:   | portion 0 | portion 1 | ... |       26 bytes each, there or not
//! large: one entry for 16 or 512 pages, see `large`
//! ```
//!
//! A region of which single pages are used here and there costs little more than those pages; one
//! that is full costs 26 bytes a page and no search, and less if its page size is large.

use std::ops::Range;
use std::sync::Arc;

use farmem_region::{Checksum, PAGE_SIZE, Version};
use farmem_vmem::Arena;

use crate::large::{Large, Mark};
use crate::table::{LEAF_PAGES, Portion};
use crate::tiers::Place;

/// More than this many portions lie side by side: as many of the few would take about as much room.
const FEW_MAX: usize = 448;
/// When portions are removed and no more than this many are left, they are few again. Below
/// `FEW_MAX`, so that they are not moved to and fro.
const FEW_AGAIN: usize = 384;
/// The few have room for as many more as an eighth of them.
const FEW_ROOM: usize = 8;

/// The portions of a leaf, page by page.
#[derive(Debug)]
pub(crate) enum Portions {
    /// Of one page each, or less.
    Single(Single),
    /// Of several pages each.
    Large(Large),
}

impl Portions {
    /// None yet, of a region with such a page size.
    pub(crate) fn new(page_bytes: u32, arena: &Arc<Arena>) -> Self {
        let unit = (page_bytes as usize / PAGE_SIZE).clamp(1, LEAF_PAGES);
        match unit {
            1 => Self::Single(Single::new(Arc::clone(arena))),
            _ => Self::Large(Large::new(Arc::clone(arena), unit)),
        }
    }

    /// A page, if it is there. What is returned is the token that the leaf holds: it is only to be
    /// looked at.
    pub(crate) fn get(&self, at: usize) -> Option<Portion> {
        match self {
            Self::Single(single) => single.get(at),
            Self::Large(large) => large.get(at),
        }
    }

    /// Looks at a page, if it is there. Its place, heat, dirt and what of it is absent may be changed.
    pub(crate) fn with<T>(&mut self, at: usize, look: impl FnOnce(&mut Portion) -> T) -> Option<T> {
        match self {
            Self::Single(single) => single.with(at, look),
            Self::Large(large) => large.with(at, look),
        }
    }

    /// Puts a page in, whose token is the leaf's then; returns the former one.
    pub(crate) fn replace(&mut self, at: usize, portion: &Portion) -> Option<Portion> {
        match self {
            Self::Single(single) => single.replace(at, portion),
            Self::Large(large) => large.replace(at, portion),
        }
    }

    /// Takes the pages of a range out.
    pub(crate) fn take(&mut self, within: Range<usize>, taken: impl FnMut(Portion)) {
        match self {
            Self::Single(single) => single.take(within, taken),
            Self::Large(large) => large.take(within, taken),
        }
    }

    /// Gives room back if no more than so many pages are left.
    pub(crate) fn gather(&mut self, left: usize) {
        if let Self::Single(single) = self {
            single.gather(left);
        }
    }

    /// Pages that are there, with their places, in their order, as [`Portions::get`].
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, Portion)> {
        let (single, large) = match self {
            Self::Single(single) => (Some(single.iter()), None),
            Self::Large(large) => (None, Some(large.iter())),
        };
        single.into_iter().flatten().chain(large.into_iter().flatten())
    }

    /// Shows each portion: its pages, as [`Portions::get`], and how hot it is, which is to be
    /// returned.
    pub(crate) fn each(&mut self, show: impl FnMut(&[(usize, Portion)], u8) -> u8) {
        match self {
            Self::Single(single) => single.each(show),
            Self::Large(large) => large.each(show),
        }
    }

    /// As many of them as of another leaf's, each made from the other's.
    pub(crate) fn map(&self, copy: impl FnMut(&Portion) -> Portion) -> Self {
        match self {
            Self::Single(single) => Self::Single(single.map(copy)),
            Self::Large(large) => Self::Large(large.map(copy)),
        }
    }

    /// Bytes that they take, beside this struct.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Single(single) => single.bytes(),
            Self::Large(large) => large.bytes(),
        }
    }
}

/// A page as it is kept: [`Portion`] without the room between its fields.
#[derive(Debug, Clone, Copy)]
#[repr(C, packed(2))]
struct Packed {
    version: u64,
    checksum: u64,
    number: u32,
    generation: u16,
    mark: Mark,
    dirty: u8,
    heat: u8,
    absent: u8,
}

/// What a region costs the server for each page that is stored, pages themselves apart.
const _: () = assert!(size_of::<Packed>() <= 26 && size_of::<(u16, Packed)>() <= 28);

impl Packed {
    const ABSENT: Self = Self {
        version: 0,
        checksum: 0,
        number: 0,
        generation: 0,
        mark: Mark::ABSENT,
        dirty: 0,
        heat: 0,
        absent: 0,
    };

    fn is_there(&self) -> bool {
        self.mark != Mark::ABSENT
    }

    fn of(portion: &Portion) -> Self {
        let (number, mark) = Mark::of(portion.place.spot());
        let Portion { dirty, heat, absent, generation, .. } = *portion;
        let (version, checksum) = (portion.version.get(), portion.checksum.get());
        Self { version, checksum, number, generation, mark, dirty, heat, absent }
    }

    /// The page, if it is there: its token is the one that is kept here.
    fn portion(self, arena: &Arena) -> Option<Portion> {
        let Self { version, checksum, number, generation, mark, dirty, heat, absent } = self;
        let place = Place::adopt(arena, mark.spot(number)?).expect("it was given by this arena");
        let (version, checksum) = (Version::new(version), Checksum::new(checksum));
        Some(Portion { place, dirty, heat, absent, generation, version, checksum })
    }
}

type All = Box<[Packed; LEAF_PAGES]>;

/// Portions of one page each.
#[derive(Debug)]
pub(crate) struct Single {
    /// Whose slots they are.
    arena: Arc<Arena>,
    few: Vec<(u16, Packed)>,
    /// If there are many; then there are no few.
    all: Option<All>,
}

impl Single {
    pub(crate) const fn new(arena: Arc<Arena>) -> Self {
        Self { arena, few: Vec::new(), all: None }
    }

    pub(crate) fn get(&self, at: usize) -> Option<Portion> {
        let packed = match &self.all {
            Some(all) => all[at],
            None => self.find(at).ok().map(|index| self.few[index].1)?,
        };
        packed.portion(&self.arena)
    }

    fn with<T>(&mut self, at: usize, look: impl FnOnce(&mut Portion) -> T) -> Option<T> {
        let found = self.find(at);
        let packed = match &mut self.all {
            Some(all) => &mut all[at],
            None => found.ok().map(|index| &mut self.few[index].1)?,
        };
        let mut portion = packed.portion(&self.arena)?;
        let result = look(&mut portion);
        *packed = Packed::of(&portion);
        Some(result)
    }

    /// Puts a portion in; returns the former one.
    pub(crate) fn replace(&mut self, at: usize, portion: &Portion) -> Option<Portion> {
        if self.all.is_none() && self.few.len() >= FEW_MAX {
            self.spread();
        }
        let packed = Packed::of(portion);
        if let Some(all) = &mut self.all {
            return std::mem::replace(&mut all[at], packed).portion(&self.arena);
        }
        match self.find(at) {
            Ok(index) => std::mem::replace(&mut self.few[index].1, packed).portion(&self.arena),
            Err(index) => {
                if self.few.len() == self.few.capacity() {
                    // A vector would begin with room for four, and double.
                    self.few.reserve_exact((self.few.len() / FEW_ROOM).max(1));
                }
                self.few.insert(index, (place(at), packed));
                None
            }
        }
    }

    /// Takes the portions of a range out.
    pub(crate) fn take(&mut self, within: Range<usize>, taken: impl FnMut(Portion)) {
        let Self { arena, few, all } = self;
        let unpack = |packed: Packed| packed.portion(arena);
        if let Some(all) = all {
            let taken_out = all[within].iter_mut();
            taken_out
                .map(|packed| std::mem::replace(packed, Packed::ABSENT))
                .filter_map(unpack)
                .for_each(taken);
            return;
        }
        let [start, end] = [within.start, within.end]
            .map(|at| few.partition_point(|(place, _)| usize::from(*place) < at));
        few.drain(start..end).filter_map(|(_, packed)| unpack(packed)).for_each(taken);
    }

    /// Gives room back if no more than so many are left.
    pub(crate) fn gather(&mut self, left: usize) {
        if left > FEW_AGAIN {
            return;
        }
        if let Some(all) = self.all.take() {
            let there = (0..).zip(all.iter().copied()).filter(|(_, packed)| packed.is_there());
            self.few.reserve_exact(left);
            self.few.extend(there);
        } else if self.few.capacity() > left + left / FEW_ROOM + FEW_ROOM {
            self.few.shrink_to(left + left / FEW_ROOM / 2);
        }
    }

    /// Those there are, with their places, in their order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, Portion)> {
        let few = self.few.iter().map(|(at, packed)| (usize::from(*at), *packed));
        let all = self.all.iter().flat_map(|all| all.iter().copied().enumerate());
        few.chain(all).filter_map(|(at, packed)| Some((at, packed.portion(&self.arena)?)))
    }

    fn each(&mut self, mut show: impl FnMut(&[(usize, Portion)], u8) -> u8) {
        let Self { arena, few, all } = self;
        let few = few.iter_mut().map(|(at, packed)| (usize::from(*at), packed));
        let all = all.iter_mut().flat_map(|all| all.iter_mut().enumerate());
        for (at, packed) in few.chain(all) {
            if let Some(portion) = packed.portion(arena) {
                packed.heat = show(&[(at, portion)], packed.heat);
            }
        }
    }

    /// As many of them as of another one's, each made from the other's.
    pub(crate) fn map(&self, mut copy: impl FnMut(&Portion) -> Portion) -> Self {
        let mut again = |packed: &Packed| {
            let portion = packed.portion(&self.arena);
            portion.map_or(Packed::ABSENT, |portion| Packed::of(&copy(&portion)))
        };
        let few = self.few.iter().map(|(at, packed)| (*at, again(packed))).collect();
        let all = self.all.as_ref().map(|all| {
            let copies: Box<[_]> = all.iter().map(&mut again).collect();
            copies.try_into().expect("as many as there were")
        });
        Self { arena: Arc::clone(&self.arena), few, all }
    }

    /// Bytes that they take, beside this struct.
    pub(crate) fn bytes(&self) -> usize {
        let all = self.all.as_ref().map_or(0, |_| size_of::<[Packed; LEAF_PAGES]>());
        self.few.capacity() * size_of::<(u16, Packed)>() + all
    }

    /// Where a portion is among the few, or would be.
    fn find(&self, at: usize) -> Result<usize, usize> {
        self.few.binary_search_by_key(&place(at), |(place, _)| *place)
    }

    /// Makes room for all of them.
    fn spread(&mut self) {
        let all: Box<[_]> = (0..LEAF_PAGES).map(|_| Packed::ABSENT).collect();
        let mut all: All = all.try_into().expect("as many as a leaf has");
        for (at, packed) in std::mem::take(&mut self.few) {
            all[usize::from(at)] = packed;
        }
        self.all = Some(all);
    }
}

impl IntoIterator for Portions {
    type Item = Portion;
    type IntoIter = Box<dyn Iterator<Item = Portion>>;

    fn into_iter(self) -> Self::IntoIter {
        match self {
            Self::Single(single) => single.into_iter(),
            Self::Large(large) => Box::new(large.into_iter()),
        }
    }
}

impl IntoIterator for Single {
    type Item = Portion;
    type IntoIter = Box<dyn Iterator<Item = Portion>>;

    fn into_iter(self) -> Self::IntoIter {
        let Self { arena, few, all } = self;
        let few = few.into_iter().map(|(_, packed)| packed);
        let all = all.into_iter().flat_map(|all| (all as Box<[_]>).into_iter());
        Box::new(few.chain(all).filter_map(move |packed| packed.portion(&arena)))
    }
}

fn place(at: usize) -> u16 {
    u16::try_from(at).expect("a leaf has 512 pages")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::Tiers;

    fn agrees(portions: &mut Single, expected: &[(usize, u64)]) {
        let all = |(at, portion): (usize, Portion)| (at, portion.version.get());
        let found: Vec<_> = portions.iter().map(all).collect();
        assert_eq!(found, expected);
        let mut again = Vec::new();
        portions.each(|pages, heat| {
            again.extend(pages.iter().map(|(at, portion)| (*at, portion.version.get())));
            heat
        });
        assert_eq!(again, expected);
        // Whatever is there, and however it came: no more than 32 bytes for each page.
        let room = 32 * expected.len() + 256;
        assert!(portions.bytes() <= room, "{} for {}", portions.bytes(), expected.len());
    }

    #[test]
    fn cap_72_few_and_many_portions_agree_with_one_option_each() {
        let tiers = Tiers::dram_only(1).unwrap();
        let mut slots = Vec::new();
        assert!(tiers.arena.take(1, &mut slots));
        let slot = slots.pop().unwrap();
        let portion = |version| Portion {
            place: Place::Dram(tiers.arena.share(&slot)),
            dirty: 0,
            heat: 0,
            absent: 0,
            generation: 0,
            version: Version::new(version),
            checksum: Checksum::new(0),
        };
        let give_up = |portion: Portion| {
            let mut slots = Vec::new();
            tiers.give_up(portion.place, &mut slots);
            tiers.arena.release(slots);
        };
        let mut seed = 42_u64;
        let mut next = |limit: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % limit
        };
        let (mut portions, mut model) = (Single::new(Arc::clone(&tiers.arena)), [None; LEAF_PAGES]);
        for step in 0..6_000 {
            let at = next(512) as usize;
            // Fills up and empties again and again.
            if step / 1_500 % 2 == 0 || next(8) == 0 {
                let former = portions.replace(at, &portion(step));
                assert_eq!(former.as_ref().map(|former| former.version.get()), model[at]);
                former.into_iter().for_each(give_up);
                model[at] = Some(step);
            } else {
                let end = (at + next(6) as usize).min(512);
                let mut taken = Vec::new();
                portions.take(at..end, |portion| {
                    taken.push(portion.version.get());
                    give_up(portion);
                });
                let expected: Vec<u64> =
                    model[at..end].iter_mut().filter_map(Option::take).collect();
                assert_eq!(taken, expected);
                portions.gather(model.iter().flatten().count());
            }
            let found = portions.get(at).map(|portion| portion.version.get());
            assert_eq!(found, model[at]);
            assert_eq!(portions.with(at, |portion| portion.version.get()), model[at]);
            if step % 100 == 0 {
                let expected: Vec<_> =
                    (0..).zip(&model).filter_map(|(at, version)| Some((at, (*version)?))).collect();
                agrees(&mut portions, &expected);
                let mut copy = portions.map(|other| portion(other.version.get()));
                agrees(&mut copy, &expected);
                copy.into_iter().for_each(give_up);
            }
        }
        portions.into_iter().for_each(give_up);
        assert_eq!(tiers.arena.tokens(&slot), 1);
        tiers.arena.release([slot]);
    }
}
