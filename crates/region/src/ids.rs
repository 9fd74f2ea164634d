//! Newtypes for every number that means something.

use core::fmt;

/// Bytes in a page, the unit that a client pages.
pub const PAGE_SIZE: usize = 4096;
/// `log2` of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name($inner);

        impl $name {
            /// Wraps the raw number.
            #[must_use]
            pub const fn new(raw: $inner) -> Self {
                Self(raw)
            }
            /// The raw number.
            #[must_use]
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// Position of a page in a region: byte offset divided by [`PAGE_SIZE`].
    PageIndex(u64)
);
number!(
    /// A number of pages.
    PageCount(u64)
);
number!(
    /// A number of bytes.
    ByteCount(u64)
);
number!(
    /// Names a region on its memory server (or, later, in its pool).
    RegionId(u64)
);
number!(
    /// Names a memory server. 0 is this machine.
    ServerId(u32)
);
number!(
    /// Names a block on its memory server.
    BlockId(u32)
);
number!(
    /// Names a client's session on one memory server. Given by setup; never used again.
    SessionId(u64)
);
number!(
    /// The generation of the right to write a region. A request with an older epoch is refused.
    Epoch(u64)
);
number!(
    /// Chosen at random by a memory server when it starts with empty memory. A server that
    /// restarted empty has another one, so it can never answer as its former self.
    Incarnation(u64)
);
number!(
    /// Version of one page's content: grows with every write of that page. 0 is "never written".
    Version(u64)
);
number!(
    /// CRC-64/NVME over region, page index, version and content of a page: a wrong, stale or
    /// misplaced page does not match.
    Checksum(u64)
);
number!(
    /// A page of local memory that the client owns and that holds, or will hold, an external
    /// page. Its bytes are reached through [`crate::Frames`].
    FrameId(u32)
);
number!(
    /// Nanoseconds on a monotonic clock whose zero has no meaning.
    Nanos(u64)
);

impl PageIndex {
    /// The page that comes `count` pages later, or `None` past the end of the number space.
    #[must_use]
    pub const fn checked_add(self, count: u64) -> Option<Self> {
        match self.0.checked_add(count) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// Byte offset of the page in its region, or `None` on overflow.
    #[must_use]
    pub const fn byte_offset(self) -> Option<u64> {
        self.0.checked_mul(PAGE_SIZE as u64)
    }
}

impl PageCount {
    /// Bytes in that many pages; saturates at the end of the number space.
    #[must_use]
    pub const fn bytes(self) -> ByteCount {
        ByteCount(self.0.saturating_mul(PAGE_SIZE as u64))
    }
}

impl ByteCount {
    /// Pages that hold that many bytes, rounded up.
    #[must_use]
    pub const fn pages_rounded_up(self) -> PageCount {
        PageCount(self.0.div_ceil(PAGE_SIZE as u64))
    }
}

impl Nanos {
    /// The instant `micros` microseconds later; saturates.
    #[must_use]
    pub const fn plus_micros(self, micros: u64) -> Self {
        Self(self.0.saturating_add(micros.saturating_mul(1_000)))
    }

    /// Nanoseconds since `earlier`; 0 if `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A run of pages of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// First page.
    pub start: PageIndex,
    /// Number of pages; a range may be empty.
    pub count: PageCount,
}

impl PageRange {
    /// The page after the last one, or `None` on overflow.
    #[must_use]
    pub const fn end(self) -> Option<PageIndex> {
        self.start.checked_add(self.count.get())
    }
}
