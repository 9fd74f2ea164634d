//! 2 MiB of a region: its portions, of which there may be few or all.
//!
//! ```text
//! few:   | 3, portion | 77, portion | ...      in their order, 40 bytes each
//! all:   | portion 0 | portion 1 | ... |       32 bytes each, there or not
//! large: one entry for 16 or 512 pages, see `large`
//! ```
//!
//! A region of which single pages are used here and there costs little more than those pages; one
//! that is full costs 32 bytes a page and no search, and less if its page size is large.

use std::ops::{Deref, Range};
use std::sync::Arc;

use farmem_region::PAGE_SIZE;
use farmem_vmem::Arena;

use crate::large::Large;
use crate::table::{LEAF_PAGES, Portion};

/// More than this many portions lie side by side: as many of the few would take as much room.
const FEW_MAX: usize = 256;
/// When portions are removed and no more than this many are left, they are few again. Far below
/// `FEW_MAX`, so that they are not moved to and fro.
const FEW_AGAIN: usize = 64;

/// The portions of a leaf, page by page.
#[derive(Debug)]
pub(crate) enum Portions {
    /// Of one page each, or less.
    Single(Single),
    /// Of several pages each.
    Large(Large),
}

/// A page of a leaf, to be looked at. What it holds is the leaf's token.
#[derive(Debug)]
pub(crate) enum Seen<'a> {
    There(&'a Portion),
    Unpacked(Portion),
}

impl Deref for Seen<'_> {
    type Target = Portion;

    fn deref(&self) -> &Portion {
        match self {
            Self::There(portion) => portion,
            Self::Unpacked(portion) => portion,
        }
    }
}

impl Portions {
    /// None yet, of a region with such a page size.
    pub(crate) fn new(page_bytes: u32, arena: &Arc<Arena>) -> Self {
        let unit = (page_bytes as usize / PAGE_SIZE).clamp(1, LEAF_PAGES);
        match unit {
            1 => Self::Single(Single::default()),
            _ => Self::Large(Large::new(Arc::clone(arena), unit)),
        }
    }

    /// A page, if it is there.
    pub(crate) fn get(&self, at: usize) -> Option<Seen<'_>> {
        match self {
            Self::Single(single) => single.get(at).map(Seen::There),
            Self::Large(large) => large.get(at).map(Seen::Unpacked),
        }
    }

    /// Looks at a page, if it is there. Its place, heat and dirt may be changed.
    pub(crate) fn with<T>(&mut self, at: usize, look: impl FnOnce(&mut Portion) -> T) -> Option<T> {
        match self {
            Self::Single(single) => single.get_mut(at).map(look),
            Self::Large(large) => large.with(at, look),
        }
    }

    /// Puts a page in; returns the former one.
    pub(crate) fn replace(&mut self, at: usize, portion: Portion) -> Option<Portion> {
        match self {
            Self::Single(single) => single.replace(at, portion),
            Self::Large(large) => large.replace(at, &portion),
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

    /// Pages that are there, with their places, in their order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, Seen<'_>)> {
        let (single, large) = match self {
            Self::Single(single) => (Some(single.iter()), None),
            Self::Large(large) => (None, Some(large.iter())),
        };
        let single = single.into_iter().flatten().map(|(at, portion)| (at, Seen::There(portion)));
        let large = large.into_iter().flatten();
        single.chain(large.map(|(at, portion)| (at, Seen::Unpacked(portion))))
    }

    /// Shows each portion: its pages, and how hot it is, which is to be returned.
    pub(crate) fn each(&mut self, show: impl FnMut(&[(usize, Seen<'_>)], u8) -> u8) {
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

type All = Box<[Option<Portion>; LEAF_PAGES]>;

/// Portions of one page each.
#[derive(Debug, Default)]
pub(crate) struct Single {
    few: Vec<(u16, Portion)>,
    /// If there are many; then there are no few.
    all: Option<All>,
}

impl Single {
    pub(crate) fn get(&self, at: usize) -> Option<&Portion> {
        match &self.all {
            Some(all) => all[at].as_ref(),
            None => self.find(at).ok().map(|index| &self.few[index].1),
        }
    }

    pub(crate) fn get_mut(&mut self, at: usize) -> Option<&mut Portion> {
        let found = self.find(at);
        match &mut self.all {
            Some(all) => all[at].as_mut(),
            None => found.ok().map(|index| &mut self.few[index].1),
        }
    }

    /// Puts a portion in; returns the former one.
    pub(crate) fn replace(&mut self, at: usize, portion: Portion) -> Option<Portion> {
        if self.all.is_none() && self.few.len() >= FEW_MAX {
            self.spread();
        }
        if let Some(all) = &mut self.all {
            return all[at].replace(portion);
        }
        match self.find(at) {
            Ok(index) => Some(std::mem::replace(&mut self.few[index].1, portion)),
            Err(index) => {
                if self.few.len() == self.few.capacity() {
                    // A vector would begin with room for four.
                    self.few.reserve_exact(self.few.len().max(1));
                }
                self.few.insert(index, (place(at), portion));
                None
            }
        }
    }

    /// Takes the portions of a range out.
    pub(crate) fn take(&mut self, within: Range<usize>, mut taken: impl FnMut(Portion)) {
        let Some(all) = &mut self.all else {
            let [start, end] = [within.start, within.end]
                .map(|at| self.few.partition_point(|(place, _)| usize::from(*place) < at));
            self.few.drain(start..end).for_each(|(_, portion)| taken(portion));
            return;
        };
        all[within].iter_mut().filter_map(Option::take).for_each(taken);
    }

    /// Gives room back if no more than so many are left.
    pub(crate) fn gather(&mut self, left: usize) {
        if left > FEW_AGAIN {
            return;
        }
        if let Some(all) = self.all.take() {
            let there = (0..).zip(all as Box<[_]>);
            self.few = there.filter_map(|(at, portion)| Some((at, portion?))).collect();
        }
    }

    /// Those there are, with their places, in their order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &Portion)> {
        let few = self.few.iter().map(|(at, portion)| (usize::from(*at), portion));
        let all = self.all.iter().flat_map(|all| all.iter().enumerate());
        few.chain(all.filter_map(|(at, portion)| Some((at, portion.as_ref()?))))
    }

    fn each(&mut self, mut show: impl FnMut(&[(usize, Seen<'_>)], u8) -> u8) {
        for (at, portion) in self.iter_mut() {
            let heat = portion.heat;
            portion.heat = show(&[(at, Seen::There(&*portion))], heat);
        }
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut Portion)> {
        let few = self.few.iter_mut().map(|(at, portion)| (usize::from(*at), portion));
        let all = self.all.iter_mut().flat_map(|all| all.iter_mut().enumerate());
        few.chain(all.filter_map(|(at, portion)| Some((at, portion.as_mut()?))))
    }

    /// As many of them as of another one's, each made from the other's.
    pub(crate) fn map(&self, mut copy: impl FnMut(&Portion) -> Portion) -> Self {
        let few = self.few.iter().map(|(at, portion)| (*at, copy(portion))).collect();
        let all = self.all.as_ref().map(|all| {
            let copies = all.iter().map(|portion| portion.as_ref().map(&mut copy));
            let copies: Box<[_]> = copies.collect();
            copies.try_into().expect("as many as there were")
        });
        Self { few, all }
    }

    /// Bytes that they take, beside this struct.
    pub(crate) fn bytes(&self) -> usize {
        let all = self.all.as_ref().map_or(0, |_| size_of::<[Option<Portion>; LEAF_PAGES]>());
        self.few.capacity() * size_of::<(u16, Portion)>() + all
    }

    /// Where a portion is among the few, or would be.
    fn find(&self, at: usize) -> Result<usize, usize> {
        self.few.binary_search_by_key(&place(at), |(place, _)| *place)
    }

    /// Makes room for all of them.
    fn spread(&mut self) {
        let all: Box<[_]> = (0..LEAF_PAGES).map(|_| None).collect();
        let mut all: All = all.try_into().expect("as many as a leaf has");
        for (at, portion) in std::mem::take(&mut self.few) {
            all[usize::from(at)] = Some(portion);
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
        let few = self.few.into_iter().map(|(_, portion)| portion);
        let all = self.all.into_iter().flat_map(|all| (all as Box<[_]>).into_iter().flatten());
        Box::new(few.chain(all))
    }
}

fn place(at: usize) -> u16 {
    u16::try_from(at).expect("a leaf has 512 pages")
}

#[cfg(test)]
mod tests {
    use farmem_region::{Checksum, Version};

    use super::*;
    use crate::tiers::{Place, Tiers};

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
        let (mut portions, mut model) = (Single::default(), [None; LEAF_PAGES]);
        for step in 0..6_000 {
            let at = next(512) as usize;
            // Fills up and empties again and again.
            if step / 1_500 % 2 == 0 || next(8) == 0 {
                let former = portions.replace(at, portion(step));
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
            assert_eq!(portions.get_mut(at).map(|portion| portion.version.get()), model[at]);
            if step % 100 == 0 {
                let all = |(at, portion): (usize, &Portion)| (at, portion.version.get());
                let found: Vec<_> = portions.iter().map(all).collect();
                let expected: Vec<_> =
                    (0..).zip(&model).filter_map(|(at, version)| Some((at, (*version)?))).collect();
                assert_eq!(found, expected);
                let again: Vec<_> =
                    portions.iter_mut().map(|(at, portion)| (at, portion.version.get())).collect();
                assert_eq!(again, expected);
                let copy = portions.map(|other| portion(other.version.get()));
                assert_eq!(copy.iter().map(all).collect::<Vec<_>>(), expected);
                let mut left = 0;
                copy.into_iter().for_each(|portion| {
                    left += 1;
                    give_up(portion);
                });
                assert_eq!(left, expected.len());
            }
        }
        portions.into_iter().for_each(give_up);
        assert_eq!(tiers.arena.tokens(&slot), 1);
        tiers.arena.release([slot]);
    }
}
