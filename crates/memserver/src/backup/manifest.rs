//! The table of a backup: which pages there are, and where each lies. Its last bytes are a checksum
//! of all others.
//!
//! ```text
//! | FMBACKUP | version u32 | page size u32 | pages u64 | source u16 | fill u16 | name bytes u32 |
//! | entries u64 | name | entries, 32 bytes each: page u64, version u64, checksum u64,           |
//! |                       file u32, position in it u32 | pages that are read first: count u32, |
//! | page u64 each, in their order | CRC32C u32 |
//! ```

use farmem_region::{Checksum, PageCount, PageIndex, Version};
use farmem_wire::crc32c;

use crate::working_set::PAGES_MAX;

const MAGIC: [u8; 8] = *b"FMBACKUP";
/// Version 2 of the table's bytes: version 1 did not say which pages are read first.
const VERSION: u32 = 2;
const OLDEST: u32 = 1;
const FIXED_BYTES: usize = 40;
const ENTRY_BYTES: usize = 32;
const READ_COUNT_BYTES: usize = 4;
const READ_BYTES: usize = 8;
const CRC_BYTES: usize = 4;

/// What a region was when it was backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) name: String,
    pub(crate) pages: PageCount,
    pub(crate) page_bytes: u32,
    /// What pages hold that are not in the table; nothing if there is no byte.
    pub(crate) fill: Option<u8>,
    /// In the order of pages.
    pub(crate) entries: Vec<BackedUp>,
    /// The pages that are read first, in that order.
    pub(crate) working_set: Vec<PageIndex>,
}

/// A page in a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BackedUp {
    pub(crate) page: PageIndex,
    pub(crate) version: Version,
    /// Bound to no region.
    pub(crate) checksum: Checksum,
    /// The number of the file.
    pub(crate) file: u32,
    /// In it, in pages.
    pub(crate) at: u32,
}

/// Why bytes are no table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoManifest {
    #[error("its table is damaged or cut short")]
    Damaged,
    #[error("its table has version {0}, this program reads versions {OLDEST} to {VERSION}")]
    Version(u32),
}

impl Manifest {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (source, fill) = self.fill.map_or((0_u16, 0_u16), |fill| (1, u16::from(fill)));
        let entry_bytes = self.entries.len() * ENTRY_BYTES;
        let read_bytes = READ_COUNT_BYTES + self.working_set.len() * READ_BYTES;
        let bytes = FIXED_BYTES + self.name.len() + entry_bytes + read_bytes + CRC_BYTES;
        let mut out = Vec::with_capacity(bytes);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.page_bytes.to_le_bytes());
        out.extend_from_slice(&self.pages.get().to_le_bytes());
        out.extend_from_slice(&source.to_le_bytes());
        out.extend_from_slice(&fill.to_le_bytes());
        // At most `NAME_BYTES_MAX`.
        out.extend_from_slice(&(self.name.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        out.extend_from_slice(self.name.as_bytes());
        for entry in &self.entries {
            out.extend_from_slice(&entry.page.get().to_le_bytes());
            out.extend_from_slice(&entry.version.get().to_le_bytes());
            out.extend_from_slice(&entry.checksum.get().to_le_bytes());
            out.extend_from_slice(&entry.file.to_le_bytes());
            out.extend_from_slice(&entry.at.to_le_bytes());
        }
        // At most `working_set::PAGES_MAX`.
        out.extend_from_slice(&(self.working_set.len() as u32).to_le_bytes());
        for page in &self.working_set {
            out.extend_from_slice(&page.get().to_le_bytes());
        }
        let crc = crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, NoManifest> {
        let (fixed, _) = bytes.split_first_chunk::<FIXED_BYTES>().ok_or(NoManifest::Damaged)?;
        let u16_at = |at: usize| u16::from_le_bytes([fixed[at], fixed[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| fixed[at + n]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| fixed[at + n]));
        if fixed[..8] != MAGIC {
            return Err(NoManifest::Damaged);
        }
        let version = u32_at(8);
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(NoManifest::Version(version));
        }
        let (covered, crc) = bytes.split_last_chunk::<CRC_BYTES>().ok_or(NoManifest::Damaged)?;
        if crc32c(covered) != u32::from_le_bytes(*crc) {
            return Err(NoManifest::Damaged);
        }
        let (name_bytes, count) = (u32_at(28) as usize, u64_at(32) as usize);
        let rest = covered.get(FIXED_BYTES..).ok_or(NoManifest::Damaged)?;
        let (name, entries) = rest.split_at_checked(name_bytes).ok_or(NoManifest::Damaged)?;
        let name = String::from_utf8(name.to_vec()).map_err(|_| NoManifest::Damaged)?;
        let entry_bytes = count.checked_mul(ENTRY_BYTES).ok_or(NoManifest::Damaged)?;
        let (entries, reads) = entries.split_at_checked(entry_bytes).ok_or(NoManifest::Damaged)?;
        let (entries, left) = entries.as_chunks::<ENTRY_BYTES>();
        let fill = match (u16_at(24), u8::try_from(u16_at(26))) {
            (0, _) => None,
            (1, Ok(fill)) => Some(fill),
            _ => return Err(NoManifest::Damaged),
        };
        let pages = PageCount::new(u64_at(16));
        let entries: Vec<_> = entries.iter().map(BackedUp::decode).collect();
        let is_sorted = entries.is_sorted_by(|one, next| one.page < next.page);
        let is_inside = entries.last().is_none_or(|last| last.page.get() < pages.get());
        if !left.is_empty() || !is_sorted || !is_inside {
            return Err(NoManifest::Damaged);
        }
        let working_set = match version {
            OLDEST if reads.is_empty() => Some(Vec::new()),
            OLDEST => None,
            _ => decode_reads(reads, pages),
        };
        let working_set = working_set.ok_or(NoManifest::Damaged)?;
        Ok(Self { name, pages, page_bytes: u32_at(12), fill, entries, working_set })
    }
}

fn decode_reads(bytes: &[u8], pages: PageCount) -> Option<Vec<PageIndex>> {
    let (count, reads) = bytes.split_first_chunk::<READ_COUNT_BYTES>()?;
    let (reads, left) = reads.as_chunks::<READ_BYTES>();
    let reads: Vec<_> =
        reads.iter().map(|read| PageIndex::new(u64::from_le_bytes(*read))).collect();
    let is_whole = left.is_empty() && reads.len() == u32::from_le_bytes(*count) as usize;
    let is_inside = reads.iter().all(|page| page.get() < pages.get());
    (is_whole && is_inside && reads.len() <= PAGES_MAX).then_some(reads)
}

impl BackedUp {
    fn decode(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        Self {
            page: PageIndex::new(u64_at(0)),
            version: Version::new(u64_at(8)),
            checksum: Checksum::new(u64_at(16)),
            file: u32_at(24),
            at: u32_at(28),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cap_75_a_table_round_trips_and_nothing_else_is_taken_for_one() {
        let entry = |page: u64| BackedUp {
            page: PageIndex::new(page),
            version: Version::new(page + 1),
            checksum: Checksum::new(u64::MAX - page),
            file: 3,
            at: page as u32,
        };
        let manifest = Manifest {
            name: "región".to_owned(),
            pages: PageCount::new(100),
            page_bytes: 512,
            fill: Some(7),
            entries: (0..100).step_by(3).map(entry).collect(),
            working_set: [7, 3, 99].map(PageIndex::new).to_vec(),
        };
        let bytes = manifest.encode();
        assert_eq!(Manifest::decode(&bytes).as_ref(), Ok(&manifest));
        // As it was before it said what is read first.
        let mut old = bytes[..bytes.len() - 3 * READ_BYTES - READ_COUNT_BYTES - CRC_BYTES].to_vec();
        old[8] = 1;
        old.extend_from_slice(&crc32c(&old).to_le_bytes());
        assert_eq!(Manifest::decode(&old), Ok(Manifest { working_set: Vec::new(), ..manifest }));
        for length in 0..bytes.len() {
            assert!(Manifest::decode(&bytes[..length]).is_err());
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            let found = Manifest::decode(&damaged);
            let expected = match at {
                8..12 => matches!(found, Err(NoManifest::Version(_))),
                _ => found == Err(NoManifest::Damaged),
            };
            assert!(expected, "byte {at}: {found:?}");
        }
    }
}
