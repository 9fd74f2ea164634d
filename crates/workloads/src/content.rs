//! Incompressible content that can be computed again at any place: a wrong, stale, torn or
//! misplaced page never passes for the right one.

use std::fmt;

/// The words that a memory holds: a function of the seed and the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    seed: u64,
}

impl Content {
    /// Content named by `seed`; two seeds share no word at one index.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed: mix(seed ^ 0x6a09_e667_f3bc_c908) }
    }

    /// The word at `index`.
    ///
    /// One step of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of the counter, so no
    /// compressor gains on it, at less than a nanosecond a word.
    #[must_use]
    #[inline]
    pub const fn word(self, index: u64) -> u64 {
        mix(self.seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// Fills `words`, which start at index `first`.
    pub fn fill(self, first: u64, words: &mut [u64]) {
        for (index, word) in (first..).zip(words) {
            *word = self.word(index);
        }
    }

    /// What [`sum_of_pages`] finds in `count` right words from index 0 on.
    #[must_use]
    pub fn sum_of_pages(self, count: u64) -> u64 {
        let mut page = [0; super::PAGE_WORDS];
        (0..count).step_by(super::PAGE_WORDS).fold(0, |sum, first| {
            let rest = usize::try_from(count - first).unwrap_or(usize::MAX);
            let page = &mut page[..rest.min(super::PAGE_WORDS)];
            self.fill(first, page);
            add_page(sum, page)
        })
    }

    /// Compares `found`, read at `index`, with what was written there.
    ///
    /// # Errors
    ///
    /// [`Mismatch`] when they differ.
    #[inline]
    pub fn check(self, index: u64, found: u64) -> Result<(), Mismatch> {
        let expected = self.word(index);
        if expected == found { Ok(()) } else { Err(Mismatch { index, expected, found }) }
    }
}

const fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// A word that is not what was written there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Which word of the memory.
    pub index: u64,
    /// What was written.
    pub expected: u64,
    /// What was read.
    pub found: u64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { index, expected, found } = self;
        let page = index / super::PAGE_WORDS as u64;
        write!(
            f,
            "wrong byte: word {index} (page {page}): expected {expected:#018x}, found {found:#018x}"
        )
    }
}

impl std::error::Error for Mismatch {}

/// A sum over words in pages that also notices pages that changed places: fast enough to be
/// taken while a benchmark's clock runs.
#[must_use]
pub fn sum_of_pages(words: &[u64]) -> u64 {
    words.chunks(super::PAGE_WORDS).fold(0, add_page)
}

fn add_page(sum: u64, page: &[u64]) -> u64 {
    let of_page = page.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
    sum.rotate_left(7).wrapping_add(of_page)
}

/// A small fast generator of places to look at, the same for the same seed.
#[derive(Clone, Debug)]
pub struct Dice {
    state: u64,
}

impl Dice {
    /// A generator named by `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { state: mix(seed) }
    }

    /// The next number below `bound`, uniform to within `bound / 2^64`.
    #[inline]
    pub fn below(&mut self, bound: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let wide = u128::from(mix(self.state)) * u128::from(bound);
        (wide >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_the_same_at_any_place_and_differs_between_seeds() {
        let mut words = vec![0; 1000];
        Content::new(7).fill(500, &mut words);
        for (offset, word) in words.iter().enumerate() {
            let index = 500 + offset as u64;
            assert_eq!(Content::new(7).check(index, *word), Ok(()));
            assert!(Content::new(8).check(index, *word).is_err());
            assert!(Content::new(7).check(index + 1, *word).is_err());
        }
    }

    #[test]
    fn the_sum_notices_a_changed_word_and_exchanged_pages() {
        let mut words = vec![0; 4 * super::super::PAGE_WORDS];
        Content::new(1).fill(0, &mut words);
        let right = sum_of_pages(&words);
        assert_eq!(Content::new(1).sum_of_pages(words.len() as u64), right);
        words[1000] ^= 1;
        assert_ne!(sum_of_pages(&words), right);
        words[1000] ^= 1;
        let (left, rest) = words.split_at_mut(super::super::PAGE_WORDS);
        left.swap_with_slice(&mut rest[..super::super::PAGE_WORDS]);
        assert_ne!(sum_of_pages(&words), right);
    }

    #[test]
    fn dice_stay_below_their_bound_and_reach_everything() {
        let mut dice = Dice::new(3);
        let mut seen = [false; 10];
        (0..1000).for_each(|_| seen[dice.below(10) as usize] = true);
        assert_eq!(seen, [true; 10]);
    }
}
