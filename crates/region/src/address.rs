//! The 64-bit external address: server id, block id and offset, with configurable widths
//! (cap 56).

use crate::{BlockId, ServerId};

/// How many bits of an external address name the server, the block and the offset in the block.
///
/// Together they are 64. The bits stand in that order from the most significant one:
///
/// ```text
///  63            48 47            32 31                             0     widths 16/16/32
/// +----------------+----------------+--------------------------------+
/// |     server     |     block      |             offset             |
/// +----------------+----------------+--------------------------------+
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressWidths {
    server: u32,
    block: u32,
    offset: u32,
}

/// Why an address or its widths cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// The widths do not make a 64-bit address.
    #[error(
        "address widths {server}/{block}/{offset} do not fit: server and block take 1 to 32 bits \
         each, the offset 12 to 62, and together they are 64"
    )]
    Widths {
        /// Bits of the server id.
        server: u32,
        /// Bits of the block id.
        block: u32,
        /// Bits of the offset.
        offset: u32,
    },
    /// A part is too large for its width.
    #[error("{part} {value} does not fit in {bits} bits")]
    TooLarge {
        /// Which part.
        part: &'static str,
        /// Its value.
        value: u64,
        /// The width.
        bits: u32,
    },
}

impl AddressWidths {
    /// 16 bits of server, 16 of block, 32 of offset: 65,536 servers of 65,536 blocks of 4 GiB.
    pub const DEFAULT: Self = Self { server: 16, block: 16, offset: 32 };

    /// Checks the widths.
    ///
    /// # Errors
    /// [`AddressError::Widths`] unless server and block take 1 to 32 bits each, the offset at
    /// least 12 (a page), and together they are 64.
    pub const fn new(server: u32, block: u32, offset: u32) -> Result<Self, AddressError> {
        let part_fits = server >= 1 && server <= 32 && block >= 1 && block <= 32;
        if part_fits && offset >= 12 && offset <= 62 && server + block + offset == 64 {
            Ok(Self { server, block, offset })
        } else {
            Err(AddressError::Widths { server, block, offset })
        }
    }

    /// Puts an address together.
    ///
    /// # Errors
    /// [`AddressError::TooLarge`] if a part does not fit in its width.
    pub fn join(
        self,
        server: ServerId,
        block: BlockId,
        offset: u64,
    ) -> Result<ExternalAddress, AddressError> {
        fits("server id", u64::from(server.get()), self.server)?;
        fits("block id", u64::from(block.get()), self.block)?;
        fits("offset", offset, self.offset)?;
        let server = u64::from(server.get()) << (self.block + self.offset);
        let block = u64::from(block.get()) << self.offset;
        Ok(ExternalAddress(server | block | offset))
    }

    /// Bytes that an address's offset reaches: the largest block.
    #[must_use]
    pub const fn block_bytes(self) -> u64 {
        1 << self.offset
    }

    /// Blocks that a server can number.
    #[must_use]
    pub const fn blocks(self) -> u64 {
        1 << self.block
    }

    /// Takes an address apart into server, block and byte offset in the block.
    #[must_use]
    pub fn split(self, address: ExternalAddress) -> (ServerId, BlockId, u64) {
        let server = address.0 >> (self.block + self.offset);
        let block = (address.0 >> self.offset) & mask(self.block);
        // Both widths are at most 32, so neither conversion can lose bits.
        let server = u32::try_from(server).unwrap_or(u32::MAX);
        let block = u32::try_from(block).unwrap_or(u32::MAX);
        (ServerId::new(server), BlockId::new(block), address.0 & mask(self.offset))
    }
}

impl Default for AddressWidths {
    fn default() -> Self {
        Self::DEFAULT
    }
}

const fn mask(bits: u32) -> u64 {
    (1 << bits) - 1
}

const fn fits(part: &'static str, value: u64, bits: u32) -> Result<(), AddressError> {
    if value <= mask(bits) { Ok(()) } else { Err(AddressError::TooLarge { part, value, bits }) }
}

/// Where a byte of external memory is: server, block and offset in one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExternalAddress(u64);

impl ExternalAddress {
    /// From the number that a server returned.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The number as it crosses the network.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cap_56_round_trip_at_both_named_widths() {
        for (server, block, offset) in [(16, 16, 32), (12, 12, 40), (1, 1, 62), (32, 20, 12)] {
            let widths = AddressWidths::new(server, block, offset).unwrap();
            let last = (
                ServerId::new(u32::try_from(mask(server)).unwrap()),
                BlockId::new(u32::try_from(mask(block)).unwrap()),
                mask(offset),
            );
            for (s, b, o) in [(ServerId::new(0), BlockId::new(1), 4095), last] {
                let address = widths.join(s, b, o).unwrap();
                assert_eq!(widths.split(address), (s, b, o));
            }
            assert!(widths.join(ServerId::new(0), BlockId::new(0), mask(offset) + 1).is_err());
        }
    }

    #[test]
    fn cap_56_widths_that_are_not_64_bits_are_refused() {
        for (server, block, offset) in [(16, 16, 31), (0, 32, 32), (33, 19, 12), (32, 32, 0)] {
            assert!(AddressWidths::new(server, block, offset).is_err());
        }
    }
}
