//! Compressed pages side by side: parcels on shelves.
//!
//! ```text
//! shelf of a size class:  | slot | slot | slot |      slots need not be neighbours
//!                         |parcel|par cel|parc el|    parcels go across their borders
//! ```
//!
//! A shelf has as many slots as waste little, and up to 64 parcels of one size.

use std::collections::HashMap;

use farmem_region::PAGE_SIZE;
use farmem_vmem::{Arena, Slot};

use crate::journal::{Record, Shelved};

/// Sizes of parcels differ by so much: on average half of it is wasted.
const STEP: usize = 128;
/// The largest parcel: a page that gets less than an eighth smaller is not worth the time.
pub(crate) const PARCEL_BYTES_MAX: usize = 28 * STEP - LENGTH_BYTES;
const CLASSES: usize = 28;
/// In front of each parcel.
const LENGTH_BYTES: usize = 2;
/// Parcels of a shelf, one bit each.
const PARCELS_MAX: usize = 64;
/// Slots of the largest shelf.
const SLOTS_MAX: usize = 8;

/// The place of one compressed page, as a token.
#[derive(Debug)]
#[must_use = "a parcel that is dropped is never free again"]
pub(crate) struct Parcel {
    shelf: u32,
    at: u8,
}

impl Parcel {
    pub(crate) const fn is(&self, other: &Self) -> bool {
        self.shelf == other.shelf && self.at == other.at
    }

    /// Shelf and position.
    pub(crate) const fn numbers(&self) -> (u32, u8) {
        (self.shelf, self.at)
    }

    /// A token for a parcel from before, to be counted by [`Shelves::restore`].
    pub(crate) const fn adopt(shelf: u32, at: u8) -> Self {
        Self { shelf, at }
    }
}

/// All shelves.
#[derive(Debug)]
pub(crate) struct Shelves {
    shelves: Vec<Option<Shelf>>,
    vacant: Vec<u32>,
    /// Shelves with room, for each class.
    open: [Vec<u32>; CLASSES],
    slots: u64,
    parcels: u64,
    /// Shelves that were built and are not noted yet.
    built: Vec<u32>,
}

#[derive(Debug)]
struct Shelf {
    class: usize,
    slots: Vec<Slot>,
    free: u64,
    /// Tokens of each parcel beyond the first one.
    sharers: Vec<u32>,
    /// Position in its class's list of shelves with room.
    open_at: usize,
}

impl Default for Shelves {
    fn default() -> Self {
        Self {
            shelves: Vec::new(),
            vacant: Vec::new(),
            open: [const { Vec::new() }; CLASSES],
            slots: 0,
            parcels: 0,
            built: Vec::new(),
        }
    }
}

impl Shelves {
    /// Pages that lie here.
    pub(crate) const fn parcels(&self) -> u64 {
        self.parcels
    }

    /// Slots that shelves take.
    pub(crate) const fn slots(&self) -> u64 {
        self.slots
    }

    /// Puts bytes on a shelf, or returns `None` if the arena has no room for a new shelf.
    pub(crate) fn put(&mut self, arena: &Arena, bytes: &[u8]) -> Option<Parcel> {
        let class = (bytes.len() + LENGTH_BYTES).div_ceil(STEP) - 1;
        let id = match self.open[class].last() {
            Some(id) => *id,
            None => self.build(arena, class)?,
        };
        let shelf = self.shelves[id as usize].as_mut().expect("an open shelf exists");
        let at = shelf.free.trailing_zeros();
        shelf.free &= shelf.free - 1;
        let start = at as usize * size_of_class(class);
        // At most `PARCEL_BYTES_MAX`.
        shelf.write(arena, start, &(bytes.len() as u16).to_le_bytes());
        shelf.write(arena, start + LENGTH_BYTES, bytes);
        if shelf.free == 0 {
            self.open[class].pop();
        }
        self.parcels += 1;
        Some(Parcel { shelf: id, at: at as u8 })
    }

    /// Copies a parcel's bytes out; returns how many.
    pub(crate) fn read(
        &self,
        arena: &Arena,
        parcel: &Parcel,
        out: &mut [u8; PARCEL_BYTES_MAX],
    ) -> usize {
        let shelf = self.shelf(parcel);
        let start = usize::from(parcel.at) * size_of_class(shelf.class);
        let mut length = [0; LENGTH_BYTES];
        shelf.read(arena, start, &mut length);
        let bytes = usize::from(u16::from_le_bytes(length)).min(out.len());
        shelf.read(arena, start + LENGTH_BYTES, &mut out[..bytes]);
        bytes
    }

    pub(crate) fn share(&mut self, parcel: &Parcel) -> Parcel {
        let shelf = self.shelves[parcel.shelf as usize].as_mut().expect("a parcel has a shelf");
        shelf.sharers[usize::from(parcel.at)] += 1;
        Parcel { ..*parcel }
    }

    #[expect(clippy::needless_pass_by_value, reason = "a token is used up")]
    pub(crate) fn give_up(&mut self, arena: &Arena, parcel: Parcel) {
        let Parcel { shelf: id, at } = parcel;
        let shelf = self.shelves[id as usize].as_mut().expect("a parcel has a shelf");
        let sharers = &mut shelf.sharers[usize::from(at)];
        if let Some(fewer) = sharers.checked_sub(1) {
            *sharers = fewer;
            return;
        }
        self.parcels -= 1;
        let open = &mut self.open[shelf.class];
        if shelf.free == 0 {
            shelf.open_at = open.len();
            open.push(id);
        }
        assert!(shelf.free & 1 << at == 0, "parcel {at} of shelf {id} is given up twice");
        shelf.free |= 1 << at;
        if shelf.free == all_free(shelf.class) {
            open.swap_remove(shelf.open_at);
            let (moved, to) = (open.get(shelf.open_at).copied(), shelf.open_at);
            if let Some(moved) = moved.and_then(|id| self.shelves[id as usize].as_mut()) {
                moved.open_at = to;
            }
            if let Some(shelf) = self.shelves[id as usize].take() {
                self.slots -= shelf.slots.len() as u64;
                arena.release(shelf.slots);
            }
            self.vacant.push(id);
        }
    }

    /// What the journal says of all shelves.
    pub(crate) fn records(&self) -> impl Iterator<Item = Record<'static>> {
        let shelves = (0..).zip(&self.shelves);
        shelves.filter_map(|(id, shelf)| shelf.as_ref().map(|shelf| shelf.record(id)))
    }

    /// Puts shelves from before in place, with so many tokens for each parcel, and adds a token for
    /// each of their slots to `slots`. `None` if that cannot be.
    pub(crate) fn restore(
        &mut self,
        arena: &Arena,
        shelved: &HashMap<u32, Shelved>,
        parcels: &HashMap<(u32, u8), u32>,
        slots: &mut HashMap<u32, u32>,
    ) -> Option<()> {
        for ((id, at), tokens) in parcels {
            let index = *id as usize;
            if self.shelves.len() <= index {
                self.shelves.resize_with(index + 1, || None);
            }
            let shelf = match &mut self.shelves[index] {
                Some(shelf) => shelf,
                empty => {
                    let shelf = Shelf::restored(arena, shelved.get(id)?)?;
                    self.slots += shelf.slots.len() as u64;
                    for slot in &shelf.slots {
                        *slots.entry(slot.number()).or_default() += 1;
                    }
                    empty.insert(shelf)
                }
            };
            *shelf.sharers.get_mut(usize::from(*at))? = tokens.checked_sub(1)?;
            shelf.free &= !(1 << at);
            self.parcels += 1;
        }
        for (id, shelf) in (0..).zip(&mut self.shelves) {
            match shelf {
                None => self.vacant.push(id),
                Some(shelf) if shelf.free != 0 => {
                    shelf.open_at = self.open[shelf.class].len();
                    self.open[shelf.class].push(id);
                }
                Some(_) => {}
            }
        }
        Some(())
    }

    fn build(&mut self, arena: &Arena, class: usize) -> Option<u32> {
        let mut slots = Vec::new();
        // At most `SLOTS_MAX`.
        if !arena.take(slots_of_class(class) as u32, &mut slots) {
            return None;
        }
        self.slots += slots.len() as u64;
        let sharers = vec![0; parcels_of_class(class)];
        let open_at = self.open[class].len();
        let shelf = Shelf { class, slots, free: all_free(class), sharers, open_at };
        let id = self.vacant.pop().unwrap_or_else(|| {
            self.shelves.push(None);
            u32::try_from(self.shelves.len() - 1).expect("fewer shelves than slots")
        });
        self.shelves[id as usize] = Some(shelf);
        self.open[class].push(id);
        self.built.push(id);
        Some(id)
    }

    /// What the journal says of shelves that were built since this was last asked.
    pub(crate) fn newly_built(&mut self) -> impl Iterator<Item = Record<'static>> {
        let built = std::mem::take(&mut self.built).into_iter();
        built.filter_map(|id| self.shelves[id as usize].as_ref().map(|shelf| shelf.record(id)))
    }

    fn shelf(&self, parcel: &Parcel) -> &Shelf {
        self.shelves[parcel.shelf as usize].as_ref().expect("a parcel has a shelf")
    }
}

impl Shelf {
    fn record(&self, id: u32) -> Record<'static> {
        let mut slots = [0; SLOTS_MAX];
        for (number, slot) in slots.iter_mut().zip(&self.slots) {
            *number = slot.number();
        }
        // Both are small.
        let (class, count) = (self.class as u8, self.slots.len() as u8);
        Record::Shelf { shelf: id, class, slots, count }
    }

    fn restored(arena: &Arena, shelved: &Shelved) -> Option<Self> {
        let class = usize::from(shelved.class);
        let slots = shelved.slots.get(..usize::from(shelved.count))?;
        if class >= CLASSES || slots.len() != slots_of_class(class) {
            return None;
        }
        let slots = slots.iter().map(|slot| arena.adopt(*slot)).collect::<Option<_>>()?;
        let sharers = vec![0; parcels_of_class(class)];
        Some(Self { class, slots, free: all_free(class), sharers, open_at: 0 })
    }

    fn write(&mut self, arena: &Arena, start: usize, bytes: &[u8]) {
        let (mut at, mut rest) = (start, bytes);
        while !rest.is_empty() {
            let page = arena.bytes_mut(&mut self.slots[at / PAGE_SIZE]);
            let room = &mut page[at % PAGE_SIZE..];
            let count = room.len().min(rest.len());
            room[..count].copy_from_slice(&rest[..count]);
            (at, rest) = (at + count, &rest[count..]);
        }
    }

    fn read(&self, arena: &Arena, start: usize, out: &mut [u8]) {
        let (mut at, mut rest) = (start, out);
        while !rest.is_empty() {
            let from = &arena.bytes(&self.slots[at / PAGE_SIZE])[at % PAGE_SIZE..];
            let count = from.len().min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&from[..count]);
            (at, rest) = (at + count, later);
        }
    }
}

const fn size_of_class(class: usize) -> usize {
    (class + 1) * STEP
}

/// As few slots as waste at most a sixteenth, or those that waste least.
const fn slots_of_class(class: usize) -> usize {
    let size = size_of_class(class);
    let (mut best, mut best_waste) = (1, usize::MAX);
    let mut slots = 1;
    while slots <= SLOTS_MAX {
        let bytes = slots * PAGE_SIZE;
        // Per slot, so that shelves of different lengths compare.
        let waste = bytes % size / slots;
        if waste < best_waste && bytes / size <= PARCELS_MAX {
            (best, best_waste) = (slots, waste);
        }
        if best_waste <= PAGE_SIZE / 16 {
            return best;
        }
        slots += 1;
    }
    best
}

const fn parcels_of_class(class: usize) -> usize {
    slots_of_class(class) * PAGE_SIZE / size_of_class(class)
}

const fn all_free(class: usize) -> u64 {
    u64::MAX >> (64 - parcels_of_class(class))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shelves_waste_little() {
        for class in 0..CLASSES {
            let used = parcels_of_class(class) * size_of_class(class);
            let all = slots_of_class(class) * PAGE_SIZE;
            assert!(used <= all && all - used <= all / 14, "class {class}: {used} of {all}");
            assert!(parcels_of_class(class) <= PARCELS_MAX);
        }
    }

    #[test]
    fn parcels_come_back_whole_and_free_their_shelves() {
        let arena = Arena::new(4096).unwrap();
        let mut shelves = Shelves::default();
        let content = |n: usize| vec![n as u8; 1 + n * 37 % PARCEL_BYTES_MAX];
        let mut kept: Vec<_> =
            (0..2000).map(|n| (n, shelves.put(&arena, &content(n)).unwrap())).collect();
        let (mut seed, mut more) = (7_usize, 1000);
        while !kept.is_empty() {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (n, parcel) = kept.swap_remove((seed >> 33) % kept.len());
            let mut out = [0; PARCEL_BYTES_MAX];
            let bytes = shelves.read(&arena, &parcel, &mut out);
            assert_eq!(out[..bytes], content(n));
            shelves.give_up(&arena, parcel);
            if seed >> 40 & 1 == 0 && more > 0 {
                more -= 1;
                let n = more;
                kept.push((n, shelves.put(&arena, &content(n)).unwrap()));
            }
        }
        assert_eq!((arena.taken(), shelves.slots(), shelves.parcels()), (0, 0, 0));
    }
}
