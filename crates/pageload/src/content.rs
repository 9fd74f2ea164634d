//! What every page holds: no two pages the same, and cheap to compare while the clock runs.

use anyhow::ensure;
use farmem_workloads::content::{Content, Dice};

/// Bytes of a page.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Bytes that tell a page from all others.
const STAMP_BYTES: usize = 8;

/// Bytes of noise. They stay in a processor's second-level cache.
const NOISE_BYTES: usize = 64 << 10;

/// Contents of all pages: a stamp, then a cutting of noise at a place that depends on the page.
pub(crate) struct Pages {
    noise: Vec<u8>,
}

impl Pages {
    pub(crate) fn new() -> Self {
        let words = (0..NOISE_BYTES as u64 / 8).map(|index| Content::new(1).word(index));
        Self { noise: words.flat_map(u64::to_le_bytes).collect() }
    }

    /// The stamp and the noise of a page.
    fn parts(&self, page: u64) -> ([u8; STAMP_BYTES], &[u8]) {
        let stamp = Content::new(2).word(page).to_le_bytes();
        let places = (NOISE_BYTES - PAGE_BYTES) as u64;
        let start = Dice::new(page).below(places) as usize;
        (stamp, &self.noise[start..start + PAGE_BYTES - STAMP_BYTES])
    }

    pub(crate) fn append(&self, page: u64, out: &mut Vec<u8>) {
        let (stamp, noise) = self.parts(page);
        out.extend_from_slice(&stamp);
        out.extend_from_slice(noise);
    }

    /// Compares every byte of a page.
    pub(crate) fn check(&self, page: u64, found: &[u8]) -> anyhow::Result<()> {
        let (stamp, noise) = self.parts(page);
        let same = found.split_first_chunk().is_some_and(|(first, rest)| {
            // Of fixed length, so that it becomes one comparison.
            *first == stamp && rest == noise
        });
        ensure!(same, "wrong bytes in page {page}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_byte_and_another_page_are_found() {
        let pages = Pages::new();
        let mut bytes = Vec::new();
        pages.append(7, &mut bytes);
        assert_eq!(bytes.len(), PAGE_BYTES);
        pages.check(7, &bytes).unwrap();
        assert!(pages.check(8, &bytes).is_err());
        assert!(pages.check(7, &bytes[..PAGE_BYTES - 1]).is_err());
        for at in [0, 8, PAGE_BYTES - 1] {
            bytes[at] ^= 1;
            assert!(pages.check(7, &bytes).is_err());
            bytes[at] ^= 1;
        }
    }
}
