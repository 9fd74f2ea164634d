//! Where pages lie: in the arena as they are (dram), compressed in slots of the same arena, or in
//! a file. A [`Place`] is a token, as a slot is: it is shared and given up here.
//!
//! ```text
//!            sink                          sink
//!   dram  ----------->  compressed  ----------------->  file
//!    ^ (a slot)          (a parcel on a shelf)           (4 KiB at a place)
//!    |                        |                            |
//!    +------------------------+----------------------------+   unpack, fetch
//! ```

mod file;
mod shelf;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farmem_region::PAGE_SIZE;
use farmem_vmem::{Arena, Slot};

use crate::config::TierConfig;
use crate::journal::{Journal, Record, Shelved, Spot};
use crate::tiers::file::FilePlace;
pub(crate) use crate::tiers::file::{FileLacks, FileTier};
use crate::tiers::shelf::{PARCEL_BYTES_MAX, Parcel, Shelves};

/// Where one page lies.
#[derive(Debug)]
pub(crate) enum Place {
    Dram(Slot),
    Compressed(Parcel),
    File(FilePlace),
}

impl Place {
    /// Where, as numbers.
    pub(crate) const fn spot(&self) -> Spot {
        match self {
            Self::Dram(slot) => Spot::Dram(slot.number()),
            Self::Compressed(parcel) => {
                let (shelf, at) = parcel.numbers();
                Spot::Compressed { shelf, at }
            }
            Self::File(place) => Spot::File(place.number()),
        }
    }

    /// The token for a place that is known by its numbers. It is not counted. `None` if there is no such
    /// place.
    pub(crate) fn adopt(arena: &Arena, spot: Spot) -> Option<Self> {
        Some(match spot {
            Spot::Dram(slot) => Self::Dram(arena.adopt(slot)?),
            Spot::Compressed { shelf, at } => Self::Compressed(Parcel::adopt(shelf, at)),
            Spot::File(number) => Self::File(FilePlace::adopt(number)),
        })
    }

    /// Whether both are tokens for the same place.
    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Dram(one), Self::Dram(other)) => one.number() == other.number(),
            (Self::Compressed(one), Self::Compressed(other)) => one.is(other),
            (Self::File(one), Self::File(other)) => one.is(other),
            (Self::Dram(_) | Self::Compressed(_) | Self::File(_), _) => false,
        }
    }

    /// Places in the file are best read in this order.
    pub(crate) const fn order(&self) -> u32 {
        match self {
            Self::File(place) => place.number(),
            Self::Dram(_) | Self::Compressed(_) => 0,
        }
    }
}

/// Why a page cannot be had from a slower tier.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("a compressed page does not decompress")]
    Compressed,
    #[error("cannot read the file tier: {0}")]
    File(io::Error),
    #[error("its checksum is not what it was")]
    Damaged,
}

/// Why places from before cannot be counted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    /// Nothing of what was said of them is to be believed.
    #[error("there are no such places")]
    NoPlace,
    /// Pages lie in the file tier, which is not as it was.
    #[error("the file tier does not hold them")]
    File(FileLacks),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Why a page is not compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stays {
    /// It gets hardly smaller.
    GainsNothing,
    /// Now; later there may be room.
    NoRoom,
}

/// What lies where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct TierUsage {
    pub(crate) compressed_pages: u64,
    /// Slots of the arena that hold compressed pages.
    pub(crate) compressed_slots: u64,
    pub(crate) file_pages: u64,
}

/// All places of a server.
#[derive(Debug)]
pub(crate) struct Tiers {
    pub(crate) arena: Arc<Arena>,
    /// Pages that may be compressed at most.
    compressed_pages_max: u64,
    shelves: Mutex<Shelves>,
    file: Option<FileTier>,
    /// Where all that happens to places is noted, in a server that is to be gone on with.
    journal: Option<Journal>,
    /// While tables are made from a journal tokens are not counted: see [`Tiers::restore`].
    is_replaying: bool,
    /// Bytes of all tables.
    table_bytes: Arc<AtomicU64>,
}

/// What a part of a table takes of memory, counted as long as it is there.
#[derive(Debug)]
pub(crate) struct Charge {
    total: Arc<AtomicU64>,
    bytes: usize,
}

impl Charge {
    /// It takes so much now.
    pub(crate) fn set(&mut self, bytes: usize) {
        if bytes != self.bytes {
            self.total.fetch_add(bytes as u64, Ordering::Relaxed);
            self.total.fetch_sub(self.bytes as u64, Ordering::Relaxed);
            self.bytes = bytes;
        }
    }
}

impl Clone for Charge {
    fn clone(&self) -> Self {
        let mut charge = Self { total: Arc::clone(&self.total), bytes: 0 };
        charge.set(self.bytes);
        charge
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// Room for one page compressed, whatever it holds.
const PACKED_BYTES: usize = lz4_flex::block::get_maximum_output_size(PAGE_SIZE);

impl Tiers {
    /// Tiers that hold nothing yet.
    pub(crate) fn new(arena: Arena, config: &TierConfig) -> io::Result<Self> {
        let file =
            config.file.as_ref().map(|file| FileTier::create(file, None, true)).transpose()?;
        Ok(Self::over(arena, config, file))
    }

    /// As [`Tiers::new`], with the file of the slowest tier.
    pub(crate) fn over(arena: Arena, config: &TierConfig, file: Option<FileTier>) -> Self {
        Self {
            arena: Arc::new(arena),
            compressed_pages_max: config.compressed.get() / PAGE_SIZE as u64,
            shelves: Mutex::new(Shelves::default()),
            file,
            journal: None,
            is_replaying: false,
            table_bytes: Arc::default(),
        }
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn dram_only(slots: u32) -> io::Result<Self> {
        Self::new(Arena::new(slots)?, &TierConfig::default())
    }

    /// From now on tokens are not counted, until [`Tiers::restore`].
    pub(crate) const fn begin_replay(&mut self) {
        self.is_replaying = true;
    }

    /// A token for a place that a journal speaks of. `None` if there is no such place. Whether there is a file
    /// for those in the file is asked last, by [`Tiers::restore`]: they may all have been left since.
    pub(crate) fn place(&self, spot: Spot) -> Option<Place> {
        Place::adopt(&self.arena, spot)
    }

    /// Counts the tokens that tables hold which were made from a journal.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(crate) fn restore(
        &mut self,
        shelved: &HashMap<u32, Shelved>,
        spots: impl Iterator<Item = Spot>,
    ) -> Result<(), RestoreError> {
        let missing = || RestoreError::NoPlace;
        let (mut slots, mut parcels, mut places) =
            (vec![0_u32; self.arena.slots() as usize], HashMap::new(), HashMap::new());
        for spot in spots {
            match spot {
                Spot::Dram(slot) => *slots.get_mut(slot as usize).ok_or_else(missing)? += 1,
                Spot::Compressed { shelf, at } => *parcels.entry((shelf, at)).or_default() += 1,
                Spot::File(number) => *places.entry(number).or_default() += 1,
            }
        }
        let mut shelf_slots = HashMap::new();
        let restored = self.shelves().restore(&self.arena, shelved, &parcels, &mut shelf_slots);
        restored.ok_or_else(missing)?;
        for (slot, tokens) in shelf_slots {
            let count = slots.get_mut(slot as usize).ok_or_else(missing)?;
            if *count > 0 || tokens > 1 {
                return Err(missing());
            }
            *count = tokens;
        }
        self.arena.restore((0..).zip(slots))?;
        match &self.file {
            Some(file) => file.restore(&places).map_err(RestoreError::File)?,
            None if places.is_empty() => {}
            None => return Err(RestoreError::File(FileLacks::File)),
        }
        self.is_replaying = false;
        Ok(())
    }

    /// Gets a file of the slowest tier, in which nothing is known to lie yet.
    pub(crate) fn keep_file(&mut self, file: Option<FileTier>) {
        self.file = file;
    }

    /// From now on everything is noted in a journal.
    pub(crate) fn keep_journal(&mut self, journal: Journal) {
        self.journal = Some(journal);
    }

    pub(crate) const fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    /// Notes something, if there is a journal.
    pub(crate) fn note<'a>(&self, record: impl FnOnce() -> Record<'a>) {
        if let Some(journal) = &self.journal {
            journal.note(&record());
        }
    }

    /// Does something while no shelf is built, with what the journal says of those there are.
    pub(crate) fn with_shelves<T>(&self, then: impl FnOnce(Vec<Record<'static>>) -> T) -> T {
        let shelves = self.shelves();
        then(shelves.records().collect())
    }

    /// The file of the slowest tier.
    pub(crate) const fn file_tier(&self) -> Option<&FileTier> {
        self.file.as_ref()
    }

    /// Bytes that the tables of all regions take; those of a leaf that copies share count once.
    pub(crate) fn table_bytes(&self) -> u64 {
        self.table_bytes.load(Ordering::Relaxed)
    }

    /// What counts a part of a table.
    pub(crate) fn charge(&self) -> Charge {
        Charge { total: Arc::clone(&self.table_bytes), bytes: 0 }
    }

    /// Whether there is any tier below dram.
    pub(crate) const fn has_slower(&self) -> bool {
        self.compressed_pages_max > 0 || self.file.is_some()
    }

    /// Whether there is a compressed tier.
    pub(crate) const fn has_compressed(&self) -> bool {
        self.compressed_pages_max > 0
    }

    /// Whether there is a file tier.
    pub(crate) const fn has_file(&self) -> bool {
        self.file.is_some()
    }

    pub(crate) fn usage(&self) -> TierUsage {
        let shelves = self.shelves();
        TierUsage {
            compressed_pages: shelves.parcels(),
            compressed_slots: shelves.slots(),
            file_pages: self.file.as_ref().map_or(0, FileTier::pages),
        }
    }

    /// A second token for the same place.
    pub(crate) fn share(&self, place: &Place) -> Place {
        if self.is_replaying {
            return self.place(place.spot()).expect("it is a place of these tiers");
        }
        match place {
            Place::Dram(slot) => Place::Dram(self.arena.share(slot)),
            Place::Compressed(parcel) => Place::Compressed(self.shelves().share(parcel)),
            Place::File(place) => Place::File(self.file().share(place)),
        }
    }

    /// Gives a token up. Slots are collected, as many are released at once more cheaply.
    pub(crate) fn give_up(&self, place: Place, slots: &mut Vec<Slot>) {
        if self.is_replaying {
            return;
        }
        match place {
            Place::Dram(slot) => slots.push(slot),
            Place::Compressed(parcel) => self.shelves().give_up(&self.arena, parcel),
            Place::File(place) => self.file().give_up(place),
        }
    }

    /// Decompresses a page into a slot. What it was before it was demoted is for the caller to check
    /// by its checksum.
    pub(crate) fn unpack(&self, place: &Place, into: &mut Slot) -> Result<(), LoadError> {
        let Place::Compressed(parcel) = place else {
            return Err(LoadError::Compressed);
        };
        let mut packed = [0; PARCEL_BYTES_MAX];
        let bytes = self.shelves().read(&self.arena, parcel, &mut packed);
        let page = self.arena.bytes_mut(into);
        let unpacked = lz4_flex::block::decompress_into(&packed[..bytes], page);
        if unpacked.ok() != Some(PAGE_SIZE) {
            return Err(LoadError::Compressed);
        }
        Ok(())
    }

    /// Reads pages from the file into slots. Waits for the disk. To be checked as well.
    pub(crate) fn fetch<'a>(
        &self,
        places: impl Iterator<Item = &'a Place>,
        slots: &mut [Slot],
    ) -> Result<(), LoadError> {
        let numbers: Vec<u32> = places.map(Place::order).collect();
        self.file().read(&self.arena, &numbers, slots).map_err(LoadError::File)
    }

    /// The page compressed.
    pub(crate) fn compress(&self, slot: &Slot) -> Result<Place, Stays> {
        // Or it would be done in vain, again and again.
        if self.shelves().parcels() >= self.compressed_pages_max {
            return Err(Stays::NoRoom);
        }
        // A client may change what it must not: what is compressed is a copy.
        let mut page = [0; PAGE_SIZE];
        self.arena.copy_out(slot, &mut page);
        let mut packed = [0; PACKED_BYTES];
        let bytes = lz4_flex::block::compress_into(&page, &mut packed);
        let bytes = bytes.map_err(|_| Stays::GainsNothing)?;
        if bytes > PARCEL_BYTES_MAX {
            return Err(Stays::GainsNothing);
        }
        let mut shelves = self.shelves();
        if shelves.parcels() >= self.compressed_pages_max {
            return Err(Stays::NoRoom);
        }
        let parcel = shelves.put(&self.arena, &packed[..bytes]).ok_or(Stays::NoRoom)?;
        for shelf in shelves.newly_built() {
            self.note(|| shelf);
        }
        Ok(Place::Compressed(parcel))
    }

    /// Writes pages to the file, as many of the first ones as there is room for. If there is room, what `begin`
    /// returns lives while they are written.
    pub(crate) fn write_out<T>(
        &self,
        slots: &[Slot],
        begin: impl FnOnce() -> T,
    ) -> io::Result<Vec<Place>> {
        let Some(file) = &self.file else {
            return Ok(Vec::new());
        };
        let written = file.write(&self.arena, slots, begin)?;
        Ok(written.into_iter().map(Place::File).collect())
    }

    fn file(&self) -> &FileTier {
        self.file.as_ref().expect("a place in a file was given by the file tier")
    }

    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiers(slots: u32, compressed_pages: u64) -> Tiers {
        let compressed = farmem_region::ByteCount::new(compressed_pages * PAGE_SIZE as u64);
        let config = TierConfig { compressed, file: None };
        Tiers::new(Arena::new(slots).unwrap(), &config).unwrap()
    }

    fn slot_with(tiers: &Tiers, fill: impl FnOnce(&mut [u8; PAGE_SIZE])) -> Slot {
        let mut slots = Vec::new();
        assert!(tiers.arena.take(1, &mut slots));
        let mut slot = slots.pop().unwrap();
        fill(tiers.arena.bytes_mut(&mut slot));
        slot
    }

    fn noise(page: &mut [u8; PAGE_SIZE]) {
        let mut word = 1_u64;
        for chunk in page.chunks_mut(8) {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1 << 60 | 1);
            chunk.copy_from_slice(&(word ^ word >> 29).to_le_bytes());
        }
    }

    #[test]
    fn cap_14_a_page_goes_to_the_compressed_tier_and_back() {
        let tiers = tiers(512, 1000);
        let text = |page: &mut [u8; PAGE_SIZE]| {
            for (at, byte) in page.iter_mut().enumerate() {
                *byte = (at / 7 % 250) as u8;
            }
        };
        let slot = slot_with(&tiers, text);
        let place = tiers.compress(&slot).unwrap();
        let second = tiers.share(&place);
        tiers.arena.release([slot]);
        let mut back = slot_with(&tiers, |page| page.fill(1));
        tiers.give_up(place, &mut Vec::new());
        tiers.unpack(&second, &mut back).unwrap();
        let mut expected = [0; PAGE_SIZE];
        text(&mut expected);
        assert_eq!(*tiers.arena.bytes(&back), expected);
        tiers.give_up(second, &mut Vec::new());
        tiers.arena.release([back]);
        assert_eq!((tiers.arena.taken(), tiers.usage()), (0, TierUsage::default()));
    }

    #[test]
    fn what_does_not_get_smaller_stays() {
        let tiers = tiers(512, 1000);
        let noise = slot_with(&tiers, noise);
        assert!(matches!(tiers.compress(&noise), Err(Stays::GainsNothing)));
        tiers.arena.release([noise]);
        assert_eq!(tiers.arena.taken(), 0);
    }

    #[test]
    fn the_compressed_tier_keeps_its_limit() {
        let tiers = tiers(512, 2);
        let slot = slot_with(&tiers, |page| page.fill(0));
        let noise = slot_with(&tiers, noise);
        assert!(matches!(tiers.compress(&noise), Err(Stays::GainsNothing)));
        let places: Vec<_> = (0..3).map(|_| tiers.compress(&slot)).collect();
        // It is not even tried.
        assert!(matches!(tiers.compress(&noise), Err(Stays::NoRoom)));
        assert_eq!(places.iter().filter(|place| place.is_ok()).count(), 2);
        places.into_iter().flatten().for_each(|place| tiers.give_up(place, &mut Vec::new()));
        tiers.arena.release([slot, noise]);
        assert_eq!(tiers.arena.taken(), 0);
    }
}
