//! Entries: one for every page (or range of pages) that a message is about.
//!
//! ```text
//!  0        8         16         24     28     32
//! +--------+---------+----------+------+------+
//! |  page  | version | checksum | slot |   0  |   page entry
//! +--------+---------+----------+------+------+
//! |  page  |  count  |         0            0  |   range entry
//! +--------+---------+----------+--+--+--------+
//! |  page  | version | checksum |at|by|    0   |   part entry: from byte `at` on `by` bytes
//! +--------+---------+----------+--+--+--------+
//! ```

use std::ops::Range;

use farmem_region::{Checksum, PAGE_SIZE, PageCount, PageIndex, PageRange, Version};

/// Bytes of one entry of either kind.
pub const PAGE_ENTRY_BYTES: usize = 32;

/// The slot of a page that lies in none, but in a slower tier or nowhere.
pub const NO_SLOT: u32 = u32::MAX;

/// What a message says about one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageEntry {
    /// Which page of the region.
    pub page: PageIndex,
    /// In a write the version to store; in a read the version wanted, 0 for whichever there is;
    /// in a reply the version stored.
    pub version: Version,
    /// The writing client's checksum over region, page, version and content; 0 in a read.
    pub checksum: Checksum,
    /// Slot of the server's arena, for a client that maps the arena, or [`NO_SLOT`]; 0 otherwise.
    pub slot: u32,
}

impl PageEntry {
    /// Appends the entry's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.page.get().to_le_bytes());
        out.extend_from_slice(&self.version.get().to_le_bytes());
        out.extend_from_slice(&self.checksum.get().to_le_bytes());
        out.extend_from_slice(&self.slot.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
    }

    /// Reads an entry.
    #[must_use]
    pub fn decode(bytes: &[u8; PAGE_ENTRY_BYTES]) -> Self {
        let [word0, word1, word2, word3] = words(bytes);
        Self {
            page: PageIndex::new(word0),
            version: Version::new(word1),
            checksum: Checksum::new(word2),
            // The low half; the high half is reserved.
            slot: (word3 & u64::from(u32::MAX)) as u32,
        }
    }

    /// Reads the entries of a message; bytes that make no whole entry are left out.
    pub fn decode_all(bytes: &[u8]) -> impl ExactSizeIterator<Item = Self> + Clone + '_ {
        bytes.as_chunks().0.iter().map(Self::decode)
    }
}

/// What a message says about a part of one page of 4 KiB: one page of a region with a smaller page
/// size, or several side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PartEntry {
    /// Which page of 4 KiB of the region.
    pub page: PageIndex,
    /// Of all of that page: in a write and a free the version that it is to have, greater than any
    /// before; in a read 0 for whichever there is; in a reply the version stored.
    pub version: Version,
    /// See [`part_checksum`](crate::part_checksum); 0 in a read and a free.
    pub checksum: Checksum,
    /// The first byte in the page.
    pub first: u16,
    /// How many bytes.
    pub bytes: u16,
}

impl PartEntry {
    /// Whether it is one page of `unit` bytes, or several, of one page of 4 KiB.
    #[must_use]
    pub const fn is_of(&self, unit: u16) -> bool {
        let (first, bytes) = (self.first as usize, self.bytes as usize);
        let end = first + bytes;
        self.bytes > 0
            && end <= PAGE_SIZE
            && self.first.is_multiple_of(unit)
            && self.bytes.is_multiple_of(unit)
    }

    /// The part's bytes in its page.
    #[must_use]
    pub const fn range(&self) -> Range<usize> {
        self.first as usize..self.first as usize + self.bytes as usize
    }

    /// Appends the entry's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.page.get().to_le_bytes());
        out.extend_from_slice(&self.version.get().to_le_bytes());
        out.extend_from_slice(&self.checksum.get().to_le_bytes());
        out.extend_from_slice(&self.first.to_le_bytes());
        out.extend_from_slice(&self.bytes.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
    }

    /// Reads an entry.
    #[must_use]
    pub fn decode(bytes: &[u8; PAGE_ENTRY_BYTES]) -> Self {
        let [word0, word1, word2, word3] = words(bytes);
        Self {
            page: PageIndex::new(word0),
            version: Version::new(word1),
            checksum: Checksum::new(word2),
            first: (word3 & 0xffff) as u16,
            bytes: (word3 >> 16 & 0xffff) as u16,
        }
    }

    /// Reads the entries of a message; bytes that make no whole entry are left out.
    pub fn decode_all(bytes: &[u8]) -> impl ExactSizeIterator<Item = Self> + Clone + '_ {
        bytes.as_chunks().0.iter().map(Self::decode)
    }
}

/// A run of pages, as a free names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeEntry(pub PageRange);

impl RangeEntry {
    /// Appends the entry's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0.start.get().to_le_bytes());
        out.extend_from_slice(&self.0.count.get().to_le_bytes());
        out.extend_from_slice(&[0; 16]);
    }

    /// Reads an entry.
    #[must_use]
    pub fn decode(bytes: &[u8; PAGE_ENTRY_BYTES]) -> Self {
        let [start, count, ..] = words(bytes);
        Self(PageRange { start: PageIndex::new(start), count: PageCount::new(count) })
    }

    /// Reads the entries of a message; bytes that make no whole entry are left out.
    pub fn decode_all(bytes: &[u8]) -> impl ExactSizeIterator<Item = Self> + Clone + '_ {
        bytes.as_chunks().0.iter().map(Self::decode)
    }
}

pub(crate) fn words(bytes: &[u8; PAGE_ENTRY_BYTES]) -> [u64; 4] {
    let mut words = [0; 4];
    for (word, chunk) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_le_bytes(*chunk);
    }
    words
}
