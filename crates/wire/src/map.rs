//! Bodies of the action map: which pages of a region are stored, in which version.

use std::time::Duration;

use farmem_region::{ExternalAddress, PageCount, PageIndex, PageRange, Version};

use crate::body::{BodyError, Fields};
use crate::entry::{PAGE_ENTRY_BYTES, words};

/// How long a client that holds a lease on its map may believe what it knows, from when it sent a
/// request whose reply says that the lease goes on. Who takes the region over, and writes, waits as long
/// at most; more would save such clients little, since one reply in each of these times is enough.
pub const MAP_LEASE: Duration = Duration::from_millis(300);

/// Asks which pages are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AskMap {
    /// The first page that is asked about.
    pub from: PageIndex,
    /// The stamp of the last reply, or 0: pages are told of only if one near them was stored or
    /// forgotten since.
    pub since: u64,
    /// Whether the client would hold a lease: nobody else changes the region while it believes what it
    /// was told.
    pub leases: bool,
    /// Whether the client would be told, ahead of replies to whatever it asks from now on, what others
    /// change. Counts where `from` is 0.
    pub news: bool,
}

/// What a page holds that is not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    /// Nothing.
    Nothing,
    /// One byte, over and over.
    Fill(u8),
    /// What only the server knows: it is to be asked for, in version 0.
    Unknown,
}

/// Follows the entries of the pages that are stored, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapReply {
    /// To ask with the next time, once the map is complete.
    pub stamp: u64,
    /// The page from which on to ask for the rest; `None` if the map is complete.
    pub next: Option<PageIndex>,
    /// Where the region's first page is.
    pub address: ExternalAddress,
    /// What the other pages hold.
    pub absent: Absent,
    /// Whether what was told before is to be forgotten: this is all there is.
    pub is_all: bool,
    /// In news: more has changed than is remembered. The map is to be asked for again, and nothing is
    /// told until it is.
    pub is_outdated: bool,
}

/// Changes that one message of news tells at most: 2 KiB. What more there is comes with the next
/// replies.
pub const NEWS_MAX: usize = 64;

/// What has become of pages: an entry of news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapChange {
    /// Which pages.
    pub range: PageRange,
    /// The version in which they are stored; `None`: they are absent.
    pub version: Option<Version>,
}

impl MapChange {
    /// Appends the entry's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.range.start.get().to_le_bytes());
        out.extend_from_slice(&self.range.count.get().to_le_bytes());
        let version = self.version.map_or(0, Version::get);
        out.extend_from_slice(&version.to_le_bytes());
        out.extend_from_slice(&u64::from(self.version.is_some()).to_le_bytes());
    }

    /// Reads an entry.
    #[must_use]
    pub fn decode(bytes: &[u8; PAGE_ENTRY_BYTES]) -> Self {
        let [start, count, version, flags] = words(bytes);
        let range = PageRange { start: PageIndex::new(start), count: PageCount::new(count) };
        Self { range, version: (flags & 1 != 0).then_some(Version::new(version)) }
    }

    /// Reads the entries of a message; bytes that make no whole entry are left out.
    pub fn decode_all(bytes: &[u8]) -> impl ExactSizeIterator<Item = Self> + Clone + '_ {
        bytes.as_chunks().0.iter().map(Self::decode)
    }
}

impl AskMap {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.from.get().to_le_bytes());
        out.extend_from_slice(&self.since.to_le_bytes());
        let flags = u32::from(self.leases) | u32::from(self.news) << 1;
        out.extend_from_slice(&flags.to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, 20)?;
        let (from, since) = (PageIndex::new(fields.u64()), fields.u64());
        let flags = fields.u32();
        Ok(Self { from, since, leases: flags & 1 != 0, news: flags & 2 != 0 })
    }
}

impl MapReply {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, fill) = match self.absent {
            Absent::Nothing => (0_u16, 0),
            Absent::Fill(fill) => (1, fill),
            Absent::Unknown => (2, 0),
        };
        let next = self.next.map_or(u64::MAX, PageIndex::get);
        out.extend_from_slice(&self.stamp.to_le_bytes());
        out.extend_from_slice(&next.to_le_bytes());
        out.extend_from_slice(&self.address.raw().to_le_bytes());
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&u16::from(fill).to_le_bytes());
        let flags = u32::from(self.is_all) | u32::from(self.is_outdated) << 1;
        out.extend_from_slice(&flags.to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError`] if it is cut short, or names a content that does not exist.
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, 32)?;
        let (stamp, next) = (fields.u64(), fields.u64());
        let address = ExternalAddress::from_raw(fields.u64());
        let (kind, fill, flags) = (fields.u16(), fields.u16(), fields.u32());
        let absent = match (kind, u8::try_from(fill)) {
            (0, _) => Absent::Nothing,
            (1, Ok(fill)) => Absent::Fill(fill),
            (2, _) => Absent::Unknown,
            _ => return Err(BodyError::Value { field: "absent", value: kind.into() }),
        };
        let next = (next != u64::MAX).then_some(PageIndex::new(next));
        let (is_all, is_outdated) = (flags & 1 != 0, flags & 2 != 0);
        Ok(Self { stamp, next, address, absent, is_all, is_outdated })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_round_trip() {
        for (absent, next, is_all) in [
            (Absent::Nothing, None, true),
            (Absent::Fill(7), Some(PageIndex::new(5)), false),
            (Absent::Unknown, None, false),
        ] {
            let address = ExternalAddress::from_raw(9);
            let reply = MapReply { stamp: 3, next, address, absent, is_all, is_outdated: !is_all };
            let mut bytes = Vec::new();
            reply.encode(&mut bytes);
            assert_eq!(MapReply::decode(&bytes), Ok(reply));
            assert!(MapReply::decode(&bytes[1..]).is_err());
        }
        let ask = AskMap { from: PageIndex::new(3), since: 4, leases: true, news: true };
        let mut bytes = Vec::new();
        ask.encode(&mut bytes);
        assert_eq!(AskMap::decode(&bytes), Ok(ask));
    }
}
