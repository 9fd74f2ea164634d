//! The two checksums of the protocol.

use crc_fast::{CrcAlgorithm, Digest};
use farmem_region::{Checksum, PAGE_SIZE, PageIndex, RegionId, Version};

/// CRC-32/ISCSI, for headers, entries and bodies.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// CRC-64/NVME over region, page, version (each as 8 little-endian bytes) and content: a wrong,
/// stale or misplaced page does not match.
///
/// Made by the client that writes the page, checked by the server that keeps it and by the client
/// that reads it.
#[must_use]
pub fn page_checksum(
    region: RegionId,
    page: PageIndex,
    version: Version,
    content: &[u8; PAGE_SIZE],
) -> Checksum {
    let mut place = [0; 24];
    place[..8].copy_from_slice(&region.get().to_le_bytes());
    place[8..16].copy_from_slice(&page.get().to_le_bytes());
    place[16..].copy_from_slice(&version.get().to_le_bytes());
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(&place);
    digest.update(content);
    Checksum::new(digest.finalize())
}

/// As [`page_checksum`], of a part of a page that begins at a byte of it: over region, page, version,
/// that byte and how many there are (as 2 little-endian bytes each, and 4 zeros), and the bytes.
///
/// # Panics
/// If there are more than 65,535 bytes.
#[must_use]
pub fn part_checksum(
    region: RegionId,
    page: PageIndex,
    version: Version,
    first: u16,
    content: &[u8],
) -> Checksum {
    let bytes = u16::try_from(content.len()).expect("a part lies in a page");
    let mut place = [0; 32];
    place[..8].copy_from_slice(&region.get().to_le_bytes());
    place[8..16].copy_from_slice(&page.get().to_le_bytes());
    place[16..24].copy_from_slice(&version.get().to_le_bytes());
    place[24..26].copy_from_slice(&first.to_le_bytes());
    place[26..28].copy_from_slice(&bytes.to_le_bytes());
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(&place);
    digest.update(content);
    Checksum::new(digest.finalize())
}

/// What binds a checksum to its region. A CRC is linear: the difference between the checksums of a
/// page in one region and in another depends on neither page, version nor content. Thus a virtual
/// copy needs no new checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding(u64);

impl Binding {
    /// Of a region.
    #[must_use]
    pub fn of(region: RegionId) -> Self {
        let of = |region| {
            page_checksum(region, PageIndex::new(0), Version::new(0), &[0; PAGE_SIZE]).get()
        };
        Self(of(region) ^ of(RegionId::new(0)))
    }

    /// What a checksum in the region would be in region 0, and the other way round.
    #[must_use]
    pub const fn turn(self, checksum: Checksum) -> Checksum {
        Checksum::new(checksum.get() ^ self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn catalogue_check_values() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        digest.update(b"123456789");
        assert_eq!(digest.finalize(), 0xae8b_1486_0a79_9888);
    }

    #[test]
    fn every_part_of_the_place_counts() {
        let content = [7; PAGE_SIZE];
        let of = |region, page, version, content| {
            page_checksum(
                RegionId::new(region),
                PageIndex::new(page),
                Version::new(version),
                content,
            )
        };
        let right = of(1, 2, 3, &content);
        let mut flipped = content;
        flipped[4095] ^= 1;
        for wrong in [of(2, 2, 3, &content), of(1, 3, 3, &content), of(1, 2, 4, &content)] {
            assert_ne!(right, wrong);
        }
        assert_ne!(right, of(1, 2, 3, &flipped));
        assert_ne!(of(1, 2, 3, &content), of(2, 1, 3, &content));
    }

    #[test]
    fn a_checksum_moves_to_another_region_without_the_content() {
        let mut content = [0; PAGE_SIZE];
        for seed in 1..50_u64 {
            content[seed as usize * 80] = seed as u8;
            let (page, version) = (PageIndex::new(seed * 7919), Version::new(seed << 40));
            let of = |region| page_checksum(RegionId::new(region), page, version, &content);
            assert_eq!(Binding::of(RegionId::new(seed)).turn(of(seed)), of(0));
            assert_eq!(Binding::of(RegionId::new(u64::MAX)).turn(of(0)), of(u64::MAX));
        }
    }
}
