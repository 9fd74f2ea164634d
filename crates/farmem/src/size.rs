//! Sizes as people write them.
//!
//! `16G`, `16GiB` and `16g` are 16 x 2^30 bytes; `16GB` is 16 x 10^9; a bare number is bytes.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A number of bytes that a person wrote or will read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Size(pub u64);

/// Why a text is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SizeError {
    /// There is no number at the start.
    #[error("a size starts with a number, as in 512MiB, 4GiB or 1T")]
    NoNumber,
    /// The unit is not known.
    #[error(
        "`{0}` is no unit of size: write K, M, G, T, P or KiB, MiB, ... (powers of 1024) or KB, MB, ... (powers of 1000)"
    )]
    Unit(String),
    /// More than 64 bits can say.
    #[error("the size is 16 EiB or more")]
    TooLarge,
}

/// Digits behind the point that are looked at; more could not change a byte count that is meant.
const FRACTION_DIGITS_MAX: usize = 9;

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let text = text.trim();
        let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(number_end);
        let unit = unit_bytes(unit.trim())?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.contains('.') {
            return Err(SizeError::NoNumber);
        }
        let whole: u64 = whole.parse().map_err(|_| SizeError::TooLarge)?;
        let fraction = &fraction[..fraction.len().min(FRACTION_DIGITS_MAX)];
        let mut bytes = u128::from(whole) * u128::from(unit);
        if let Ok(digits) = fraction.parse::<u32>() {
            let scale = 10_u128.pow(u32::try_from(fraction.len()).unwrap_or(u32::MAX));
            bytes += u128::from(unit) * u128::from(digits) / scale;
        }
        u64::try_from(bytes).map(Self).map_err(|_| SizeError::TooLarge)
    }
}

fn unit_bytes(unit: &str) -> Result<u64, SizeError> {
    let lower = unit.to_ascii_lowercase();
    let mut letters = lower.chars();
    let exponent = match letters.next() {
        None => 0,
        Some('b') if lower == "b" => 0,
        Some(letter) => match "kmgtp".find(letter) {
            Some(index) => u32::try_from(index).unwrap_or(0) + 1,
            None => return Err(SizeError::Unit(unit.to_owned())),
        },
    };
    let base: u64 = match letters.as_str() {
        "" | "ib" | "i" => 1024,
        "b" => 1000,
        _ => return Err(SizeError::Unit(unit.to_owned())),
    };
    Ok(base.pow(exponent))
}

impl fmt::Display for Size {
    /// Three significant digits or so, in powers of 1024: `256 MiB`, `1.5 GiB`, `17 B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let unit = (self.0.max(1).ilog2() / 10) as usize;
        let shift = 10 * unit;
        let whole = self.0 >> shift;
        let tenth = ((u128::from(self.0) * 10) >> shift) % 10;
        if whole < 10 && tenth > 0 {
            write!(f, "{whole}.{tenth} {}", UNITS[unit])
        } else {
            write!(f, "{whole} {}", UNITS[unit])
        }
    }
}

/// How much more is promised than there is, in percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ratio(pub u64);

impl FromStr for Ratio {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // As a size: 2.5 has that many hundredths of one.
        let hundredths = text.parse::<f64>().ok().map(|ratio| (ratio * 100.0).round());
        match hundredths {
            // Exact in a float and far below what a number of bytes could be multiplied by.
            Some(percent) if (1.0..1e12).contains(&percent) => Ok(Self(percent as u64)),
            _ => Err("a ratio is a number such as 1, 2.5 or 1000".to_owned()),
        }
    }
}

/// A tier below memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tier {
    /// Pages of so many bytes are kept compressed.
    Compressed(Size),
    /// Pages of so many bytes go to a file in a directory.
    File(PathBuf, Size),
}

impl FromStr for Tier {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = |text: &str| text.parse::<Size>().map_err(|error| error.to_string());
        match text.split_once('=') {
            Some(("compressed", amount)) => size(amount).map(Self::Compressed),
            Some(("file", place)) => match place.rsplit_once(':') {
                Some((directory, amount)) if !directory.is_empty() => {
                    size(amount).map(|amount| Self::File(directory.into(), amount))
                }
                _ => Err("write file=DIR:SIZE".to_owned()),
            },
            _ => Err("a tier is compressed=SIZE or file=DIR:SIZE".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_mean_them() {
        for (text, bytes) in [
            ("0", 0),
            ("17", 17),
            ("17B", 17),
            ("16G", 16 << 30),
            ("16g", 16 << 30),
            ("16GiB", 16 << 30),
            ("16gib", 16 << 30),
            ("16Gi", 16 << 30),
            ("16GB", 16_000_000_000),
            ("512MiB", 512 << 20),
            ("512 MiB", 512 << 20),
            ("1T", 1 << 40),
            ("2P", 2 << 50),
            ("1.5G", 3 << 29),
            ("0.5KB", 500),
            ("16383P", 16_383 << 50),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_reason() {
        for text in ["", "G", "-1", ".5G", "1.2.3G", "four"] {
            let error = text.parse::<Size>().unwrap_err();
            assert!(matches!(error, SizeError::NoNumber | SizeError::Unit(_)), "{text}: {error}");
        }
        assert_eq!("5X".parse::<Size>(), Err(SizeError::Unit("X".to_owned())));
        assert_eq!("5GBB".parse::<Size>(), Err(SizeError::Unit("GBB".to_owned())));
        for text in ["16384P", "18446744073709551616", "99999999999999999999G"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (256 << 20, "256 MiB"),
            (u64::MAX, "15 EiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn tiers_and_ratios() {
        assert_eq!("compressed=4G".parse(), Ok(Tier::Compressed(Size(4 << 30))));
        let file = Tier::File("/var/a:b".into(), Size(1 << 20));
        assert_eq!("file=/var/a:b:1M".parse(), Ok(file));
        for text in ["", "compressed", "compressed=x", "file=1G", "file=:1G", "tape=1G"] {
            assert!(text.parse::<Tier>().is_err(), "{text}");
        }
        assert_eq!("1".parse(), Ok(Ratio(100)));
        assert_eq!("2.5".parse(), Ok(Ratio(250)));
        for text in ["", "0", "-1", "x", "nan", "inf", "1e300"] {
            assert!(text.parse::<Ratio>().is_err(), "{text}");
        }
    }
}
