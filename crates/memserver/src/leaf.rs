//! 2 MiB of a region: its portions, of which there may be few or all.
//!
//! ```text
//! few:  | 3, portion | 77, portion | ...      in their order, 40 bytes each
//! all:  | portion 0 | portion 1 | ... |       32 bytes each, there or not
//! ```
//!
//! A region of which single pages are used here and there costs little more than those pages; one
//! that is full costs 32 bytes a page and no search.

use std::ops::Range;

use crate::table::{LEAF_PAGES, Portion};

/// More than this many portions lie side by side: as many of the few would take as much room.
const FEW_MAX: usize = 256;
/// When portions are removed and no more than this many are left, they are few again. Far below
/// `FEW_MAX`, so that they are not moved to and fro.
const FEW_AGAIN: usize = 64;

type All = Box<[Option<Portion>; LEAF_PAGES]>;

/// The portions of a leaf.
#[derive(Debug, Default)]
pub(crate) struct Portions {
    few: Vec<(u16, Portion)>,
    /// If there are many; then there are no few.
    all: Option<All>,
}

impl Portions {
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
    #[cfg(test)]
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
        let (mut portions, mut model) = (Portions::default(), [None; LEAF_PAGES]);
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
