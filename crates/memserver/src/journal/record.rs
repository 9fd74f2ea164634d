//! What the journal says, and its bytes.
//!
//! ```text
//!  0        4       6      7      8
//! +--------+-------+------+------+------------------+
//! | CRC32C | bytes | kind | flag | numbers, texts   |     CRC over all that follows it
//! +--------+-------+------+------+------------------+
//! ```

use farmem_region::{Checksum, PageIndex, PageRange, RegionId, Version};
use farmem_wire::{Tier, crc32c};

/// Bytes in front of what a record says.
const HEAD: usize = 8;
/// Bytes of the longest record: a session with a long name and two long paths.
pub(crate) const RECORD_BYTES_MAX: usize = 2048;

/// Bytes of the record of a stored page: nearly all of what a journal that was just rewritten has.
pub(crate) const PUT_BYTES: u64 = 56;

/// Where a page lies, as numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spot {
    Dram(u32),
    Compressed { shelf: u32, at: u8 },
    File(u32),
}

/// When a file was born (0 if nobody knows) and its inode, or incarnation and number of another server's region: what was noted before journals had them is of any file.
pub(crate) type FileIdentity = Option<(u64, u64)>;

/// A range of a file that a clone has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OwnRecord<'a> {
    pub(crate) path: &'a str,
    pub(crate) offset: u64,
    pub(crate) identity: FileIdentity,
}

/// All that is known of a session and its region, but for pages, blocks and pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SessionRecord<'a> {
    pub(crate) session: RegionId,
    pub(crate) token: u64,
    pub(crate) granted: u64,
    pub(crate) epoch: u64,
    pub(crate) pages: u64,
    pub(crate) page_bytes: u32,
    pub(crate) generation: u16,
    /// See the constants below.
    pub(crate) flags: u16,
    pub(crate) source: SourceRecord<'a>,
    pub(crate) name: &'a str,
    /// The range of its own that a clone has, if that does not hold all of it yet.
    pub(crate) own: Option<OwnRecord<'a>>,
}

impl SessionRecord<'_> {
    pub(crate) const DYNAMIC: u16 = 1;
    pub(crate) const RESIDENT: u16 = 2;
    pub(crate) const FROZEN: u16 = 4;
    pub(crate) const COPIES_ON_ACCESS: u16 = 8;
    pub(crate) const WRITES_BACK: u16 = 16;
    pub(crate) const TEMPORARY: u16 = 32;
    pub(crate) const HAS_OWN_RANGE: u16 = 64;
    /// Set by what encodes: `own` follows the path.
    const UNFILLED: u16 = 128;
    /// Set by what encodes: each file's path comes with which file that is.
    const IDENTIFIED: u16 = 256;

    /// The same session, gone after a restart.
    pub(crate) const fn temporary(self) -> Self {
        Self { flags: self.flags | Self::TEMPORARY, ..self }
    }
}

/// As `region::Source`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceRecord<'a> {
    Nothing,
    Fill(u8),
    File {
        path: &'a str,
        offset: u64,
        identity: FileIdentity,
    },
    /// The other server's address and its region's name, with a line feed between them.
    Server {
        path: &'a str,
        offset: u64,
        identity: FileIdentity,
    },
}

/// A page that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageRecord {
    pub(crate) region: RegionId,
    pub(crate) page: PageIndex,
    pub(crate) version: Version,
    /// Bound to no region.
    pub(crate) checksum: Checksum,
    pub(crate) spot: Spot,
    pub(crate) generation: u16,
    pub(crate) dirty: u8,
    /// The eighths that are not there.
    pub(crate) absent: u8,
}

/// One thing that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Record<'a> {
    /// A session is there, or what is said of it has changed.
    Session(SessionRecord<'a>),
    /// The next block of a region.
    Block {
        region: RegionId,
        block: u32,
    },
    /// A session is over, and all that it held.
    End(RegionId),
    /// A region holds what another one holds, and is to be kept where that is.
    Copy {
        to: RegionId,
        from: RegionId,
    },
    /// A page is stored.
    Put(PageRecord),
    /// A page has moved, for all regions that share its leaf.
    Move {
        region: RegionId,
        page: PageIndex,
        spot: Spot,
    },
    /// A page is as its file has it, for all regions that share its leaf.
    Clean {
        region: RegionId,
        page: PageIndex,
    },
    /// The leaf of a page is the region's own from now on.
    Own {
        region: RegionId,
        page: PageIndex,
    },
    /// A region shares the leaf of a page with another one.
    Share {
        to: RegionId,
        from: RegionId,
        page: PageIndex,
    },
    /// Pages of one leaf are forgotten.
    Remove {
        region: RegionId,
        range: PageRange,
    },
    Pin {
        region: RegionId,
        range: PageRange,
    },
    Unpin {
        region: RegionId,
        range: PageRange,
    },
    /// Only so many blocks of a region are left.
    KeepBlocks {
        region: RegionId,
        keep: u32,
    },
    /// Pages are to be kept in a tier, or where their use puts them.
    Prefer {
        region: RegionId,
        range: PageRange,
        tier: Option<Tier>,
    },
    /// A region counts as a copy of another one.
    CopyOf {
        to: RegionId,
        from: RegionId,
    },
    /// A shelf is built from slots.
    Shelf {
        shelf: u32,
        class: u8,
        slots: [u32; 8],
        count: u8,
    },
    /// Everything before is on the disk, and nothing was changed since.
    Stopped,
    /// Another process has gone on.
    Started,
    /// A stored page was read, as the first one of a spell if it says so.
    Read {
        region: RegionId,
        page: PageIndex,
        begins: bool,
    },
}

/// Why a record cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotARecord {
    /// Zeros, or the end of the file.
    Nothing,
    /// Its checksum is wrong, or it means nothing.
    Damaged,
}

impl<'a> Record<'a> {
    /// Appends the record's bytes.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; HEAD]);
        let (kind, flag) = self.encode_rest(out);
        let bytes = u16::try_from(out.len() - start).expect("at most RECORD_BYTES_MAX");
        out[start + 4..start + 6].copy_from_slice(&bytes.to_le_bytes());
        out[start + 6] = kind;
        out[start + 7] = flag;
        let crc = crc32c(&out[start + 4..]);
        out[start..start + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// Appends what comes after the head; returns kind and flag.
    fn encode_rest(&self, out: &mut Vec<u8>) -> (u8, u8) {
        let mut tell = |kind: u8, flag: u8, list: &[u64]| {
            list.iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
            (kind, flag)
        };
        let range = |region: &RegionId, range: &PageRange| {
            [region.get(), range.start.get(), range.count.get()]
        };
        match self {
            Self::Session(session) => (1, session.encode(out)),
            Self::Block { region, block } => tell(2, 0, &[region.get(), u64::from(*block)]),
            Self::End(region) => tell(3, 0, &[region.get()]),
            Self::Copy { to, from } => tell(4, 0, &[to.get(), from.get()]),
            Self::Put(page) => {
                let (kind, spot) = page.spot.number();
                let tags = u64::from(page.generation)
                    | u64::from(page.dirty) << 16
                    | u64::from(page.absent) << 24;
                let PageRecord { region, page, version, checksum, .. } = page;
                let page = [region.get(), page.get(), version.get(), checksum.get(), spot, tags];
                tell(5, kind, &page)
            }
            Self::Move { region, page, spot } => {
                let (kind, spot) = spot.number();
                tell(6, kind, &[region.get(), page.get(), spot])
            }
            Self::Clean { region, page } => tell(7, 0, &[region.get(), page.get()]),
            Self::Own { region, page } => tell(8, 0, &[region.get(), page.get()]),
            Self::Share { to, from, page } => tell(9, 0, &[to.get(), from.get(), page.get()]),
            Self::Remove { region, range: pages } => tell(10, 0, &range(region, pages)),
            Self::Pin { region, range: pages } => tell(11, 0, &range(region, pages)),
            Self::Unpin { region, range: pages } => tell(12, 0, &range(region, pages)),
            Self::Shelf { shelf, class, slots, count } => {
                tell(13, *count, &[u64::from(*shelf), u64::from(*class)]);
                let slots = slots.map(u64::from);
                tell(13, *count, &slots[..usize::from(*count)])
            }
            Self::Stopped => (14, 0),
            Self::Started => (15, 0),
            Self::Read { region, page, begins } => {
                tell(16, u8::from(*begins), &[region.get(), page.get()])
            }
            Self::KeepBlocks { region, keep } => tell(20, 0, &[region.get(), u64::from(*keep)]),
            Self::Prefer { region, range: pages, tier } => {
                // There are three.
                tell(21, Tier::number(*tier) as u8, &range(region, pages))
            }
            Self::CopyOf { to, from } => tell(22, 0, &[to.get(), from.get()]),
        }
    }

    /// Reads the record at the front of `bytes`; returns it with its length.
    pub(crate) fn decode(bytes: &'a [u8]) -> Result<(Self, usize), NotARecord> {
        let Some((head, _)) = bytes.split_first_chunk::<HEAD>() else {
            return Err(NotARecord::Nothing);
        };
        if *head == [0; HEAD] {
            return Err(NotARecord::Nothing);
        }
        let [c0, c1, c2, c3, l0, l1, kind, flag] = *head;
        let length = usize::from(u16::from_le_bytes([l0, l1]));
        let record = bytes.get(..length).filter(|_| length >= HEAD).ok_or(NotARecord::Damaged)?;
        if crc32c(&record[4..]) != u32::from_le_bytes([c0, c1, c2, c3]) {
            return Err(NotARecord::Damaged);
        }
        let decoded = Self::decode_rest(kind, flag, &record[HEAD..]);
        decoded.map(|record| (record, length)).ok_or(NotARecord::Damaged)
    }

    fn decode_rest(kind: u8, flag: u8, rest: &'a [u8]) -> Option<Self> {
        let mut fields = Numbers(rest);
        Some(match kind {
            1 => Self::Session(SessionRecord::decode(flag, rest)?),
            2 => Self::Block { region: fields.region()?, block: fields.u32()? },
            3 => Self::End(fields.region()?),
            4 => Self::Copy { to: fields.region()?, from: fields.region()? },
            5 => {
                let (region, page) = (fields.region()?, fields.page()?);
                let version = Version::new(fields.next()?);
                let checksum = Checksum::new(fields.next()?);
                let spot = Spot::of(flag, fields.next()?)?;
                let tags = fields.next()?;
                let generation = (tags & 0xffff) as u16;
                let dirty = (tags >> 16 & 0xff) as u8;
                let absent = (tags >> 24 & 0xff) as u8;
                let page =
                    PageRecord { region, page, version, checksum, spot, generation, dirty, absent };
                Self::Put(page)
            }
            6 => {
                let (region, page) = (fields.region()?, fields.page()?);
                Self::Move { region, page, spot: Spot::of(flag, fields.next()?)? }
            }
            7 => Self::Clean { region: fields.region()?, page: fields.page()? },
            8 => Self::Own { region: fields.region()?, page: fields.page()? },
            9 => {
                let (to, from) = (fields.region()?, fields.region()?);
                Self::Share { to, from, page: fields.page()? }
            }
            10 => Self::Remove { region: fields.region()?, range: fields.range()? },
            11 => Self::Pin { region: fields.region()?, range: fields.range()? },
            12 => Self::Unpin { region: fields.region()?, range: fields.range()? },
            13 => {
                let (shelf, class) = (fields.u32()?, u8::try_from(fields.next()?).ok()?);
                let mut slots = [0; 8];
                for slot in slots.get_mut(..usize::from(flag))? {
                    *slot = fields.u32()?;
                }
                Self::Shelf { shelf, class, slots, count: flag }
            }
            14 => Self::Stopped,
            15 => Self::Started,
            16 => Self::Read { region: fields.region()?, page: fields.page()?, begins: flag != 0 },
            20 => Self::KeepBlocks { region: fields.region()?, keep: fields.u32()? },
            21 => {
                let (region, range) = (fields.region()?, fields.range()?);
                Self::Prefer { region, range, tier: Tier::of(flag.into()).ok()? }
            }
            22 => Self::CopyOf { to: fields.region()?, from: fields.region()? },
            _ => return None,
        })
    }
}

impl<'a> SessionRecord<'a> {
    fn encode(&self, out: &mut Vec<u8>) -> u8 {
        let mut of_source = None;
        let (kind, number, path) = match self.source {
            SourceRecord::Nothing => (0, 0, ""),
            SourceRecord::Fill(byte) => (1, u64::from(byte), ""),
            SourceRecord::File { path, offset, identity } => {
                of_source = Some(identity);
                (2, offset, path)
            }
            SourceRecord::Server { path, offset, identity } => {
                of_source = Some(identity);
                (3, offset, path)
            }
        };
        let of_own = self.own.map(|own| own.identity);
        let is_identified = of_source.flatten().or(of_own.flatten()).is_some();
        let unfilled = if self.own.is_some() { Self::UNFILLED } else { 0 };
        let identified = if is_identified { Self::IDENTIFIED } else { 0 };
        let tags = u64::from(self.page_bytes)
            | u64::from(self.generation) << 32
            | u64::from(self.flags | unfilled | identified) << 48;
        let tell = |identity: Option<FileIdentity>, out: &mut Vec<u8>| {
            if let Some(identity) = identity.filter(|_| is_identified) {
                let (device, inode) = identity.unwrap_or_default();
                out.extend_from_slice(&device.to_le_bytes());
                out.extend_from_slice(&inode.to_le_bytes());
            }
        };
        let lengths = self.name.len() as u64 | (path.len() as u64) << 32;
        for number in [
            self.session.get(),
            self.token,
            self.granted,
            self.epoch,
            self.pages,
            tags,
            number,
            lengths,
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(self.name.as_bytes());
        out.extend_from_slice(path.as_bytes());
        tell(of_source, out);
        if let Some(OwnRecord { path, offset, .. }) = self.own {
            out.extend_from_slice(&offset.to_le_bytes());
            tell(of_own, out);
            out.extend_from_slice(path.as_bytes());
        }
        kind
    }

    fn decode(kind: u8, rest: &'a [u8]) -> Option<Self> {
        let mut fields = Numbers(rest);
        let (session, token, granted) = (fields.region()?, fields.next()?, fields.next()?);
        let (epoch, pages, tags) = (fields.next()?, fields.next()?, fields.next()?);
        let (number, lengths) = (fields.next()?, fields.next()?);
        let page_bytes = (tags & 0xffff_ffff) as u32;
        let (generation, flags) = ((tags >> 32 & 0xffff) as u16, (tags >> 48) as u16);
        let (name, path) = (lengths & 0xffff_ffff, lengths >> 32);
        let (name, rest) = fields.0.split_at_checked(name as usize)?;
        let (path, rest) = rest.split_at_checked(path as usize)?;
        let (name, path) = (str::from_utf8(name).ok()?, str::from_utf8(path).ok()?);
        let mut fields = Numbers(rest);
        let is_identified = flags & Self::IDENTIFIED != 0;
        let identity = |fields: &mut Numbers<'_>| -> Option<FileIdentity> {
            let found = if is_identified { (fields.next()?, fields.next()?) } else { (0, 0) };
            Some(Some(found).filter(|found| *found != (0, 0)))
        };
        let source = match kind {
            0 => SourceRecord::Nothing,
            1 => SourceRecord::Fill(u8::try_from(number).ok()?),
            2 => SourceRecord::File { path, offset: number, identity: identity(&mut fields)? },
            3 => SourceRecord::Server { path, offset: number, identity: identity(&mut fields)? },
            _ => return None,
        };
        let own = if flags & Self::UNFILLED != 0 {
            let (offset, identity) = (fields.next()?, identity(&mut fields)?);
            Some(OwnRecord { path: str::from_utf8(fields.0).ok()?, offset, identity })
        } else if fields.0.is_empty() {
            None
        } else {
            return None;
        };
        Some(Self {
            session,
            token,
            granted,
            epoch,
            pages,
            page_bytes,
            generation,
            flags: flags & !(Self::UNFILLED | Self::IDENTIFIED),
            source,
            name,
            own,
        })
    }
}

impl Spot {
    const fn number(self) -> (u8, u64) {
        match self {
            Self::Dram(slot) => (0, slot as u64),
            Self::Compressed { shelf, at } => (1, shelf as u64 | (at as u64) << 32),
            Self::File(place) => (2, place as u64),
        }
    }

    fn of(kind: u8, number: u64) -> Option<Self> {
        let low = (number & 0xffff_ffff) as u32;
        match (kind, number >> 32) {
            (0, 0) => Some(Self::Dram(low)),
            (1, at) => Some(Self::Compressed { shelf: low, at: u8::try_from(at).ok()? }),
            (2, 0) => Some(Self::File(low)),
            _ => None,
        }
    }
}

/// Numbers one after the other.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn next(&mut self) -> Option<u64> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*number))
    }

    fn u32(&mut self) -> Option<u32> {
        u32::try_from(self.next()?).ok()
    }

    fn region(&mut self) -> Option<RegionId> {
        self.next().map(RegionId::new)
    }

    fn page(&mut self) -> Option<PageIndex> {
        self.next().map(PageIndex::new)
    }

    fn range(&mut self) -> Option<PageRange> {
        let (start, count) = (self.page()?, farmem_region::PageCount::new(self.next()?));
        Some(PageRange { start, count })
    }
}

#[cfg(test)]
mod tests {
    use farmem_region::PageCount;

    use super::*;

    fn session(source: SourceRecord<'_>) -> SessionRecord<'_> {
        SessionRecord {
            session: RegionId::new(7),
            token: u64::MAX,
            granted: 1 << 40,
            epoch: 3,
            pages: 4,
            page_bytes: 2 << 20,
            generation: 500,
            flags: SessionRecord::RESIDENT | SessionRecord::TEMPORARY,
            source,
            name: "región",
            own: None,
        }
    }

    #[test]
    fn records_round_trip_and_a_torn_one_is_none() {
        let (region, page) = (RegionId::new(7), PageIndex::new(1 << 40));
        let range = PageRange { start: page, count: PageCount::new(9) };
        let clone = SessionRecord {
            flags: SessionRecord::HAS_OWN_RANGE | SessionRecord::WRITES_BACK,
            own: Some(OwnRecord { path: "/b/ç", offset: 1 << 42, identity: None }),
            ..session(SourceRecord::File { path: "/a/b", offset: 4096, identity: None })
        };
        let known = Some((u64::MAX, 3));
        let own = OwnRecord { path: "/c", offset: 7, identity: known };
        let identified = |source| SessionRecord { own: Some(own), ..session(source) };
        let file = |identity| SourceRecord::File { path: "/a/b", offset: 1 << 41, identity };
        let server = SourceRecord::Server { path: "a\nb", offset: 3, identity: known };
        let put = |spot| {
            let (version, checksum) = (Version::new(5), Checksum::new(6));
            Record::Put(PageRecord {
                region,
                page,
                version,
                checksum,
                spot,
                generation: 0xffee,
                dirty: 0x81,
                absent: 0x42,
            })
        };
        let all = [
            Record::Session(session(SourceRecord::Nothing)),
            Record::Session(session(SourceRecord::Fill(255))),
            Record::Session(session(file(None))),
            Record::Session(session(file(known))),
            Record::Session(identified(file(None))),
            Record::Session(identified(file(known))),
            Record::Session(identified(SourceRecord::Nothing)),
            Record::Session(session(server)),
            Record::Session(clone),
            Record::Block { region, block: u32::MAX },
            Record::End(region),
            Record::Copy { to: region, from: RegionId::new(1) },
            put(Spot::Dram(3)),
            put(Spot::Compressed { shelf: u32::MAX, at: 63 }),
            put(Spot::File(u32::MAX)),
            Record::Move { region, page, spot: Spot::Dram(8) },
            Record::Clean { region, page },
            Record::Own { region, page },
            Record::Share { to: region, from: RegionId::new(1), page },
            Record::Remove { region, range },
            Record::Pin { region, range },
            Record::Unpin { region, range },
            Record::Shelf { shelf: 1, class: 27, slots: [1, 2, 3, 0, 0, 0, 0, 0], count: 3 },
            Record::Stopped,
            Record::Started,
        ];
        let mut bytes = Vec::new();
        for record in all {
            bytes.clear();
            record.encode(&mut bytes);
            assert!(!matches!(record, Record::Put(_)) || bytes.len() as u64 == PUT_BYTES);
            assert_eq!(Record::decode(&bytes), Ok((record, bytes.len())));
            for torn in 1..bytes.len() {
                let mut half = bytes.clone();
                half[torn..].fill(0);
                if half != bytes {
                    assert!(Record::decode(&half).is_err(), "{record:?} torn at {torn}");
                }
            }
        }
        assert_eq!(Record::decode(&[0; 100]), Err(NotARecord::Nothing));
    }
}
