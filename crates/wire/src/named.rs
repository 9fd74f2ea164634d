//! Bodies of the actions on named regions: create, open, list, show, clone, snapshot, and the
//! operations on ranges.

use std::ops::Range;

use farmem_region::{ByteCount, PageCount, PageIndex, RegionId};

use crate::body::{BodyError, Fields, NAME_BYTES_MAX};

/// Bytes of the longest path of a backing file.
pub const PATH_BYTES_MAX: usize = 640;

/// Bytes of the longest address of another memory server.
pub const ADDRESS_BYTES_MAX: usize = 256;

/// The page sizes that a region may have, in bytes.
pub const PAGE_SIZES: [u32; 5] = [512, 1 << 10, 4 << 10, 64 << 10, 2 << 20];

/// Where a portion lies, from the fastest to the slowest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// In memory, as it is.
    Dram,
    /// In memory, compressed.
    Compressed,
    /// In a file.
    File,
}

impl Tier {
    /// Every tier.
    pub const ALL: [Self; 3] = [Self::Dram, Self::Compressed, Self::File];

    /// A word for people and programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dram => "dram",
            Self::Compressed => "compressed",
            Self::File => "file",
        }
    }

    /// The number of a preference: 0 is none.
    #[must_use]
    pub const fn number(preference: Option<Self>) -> u16 {
        match preference {
            None => 0,
            Some(Self::Dram) => 1,
            Some(Self::Compressed) => 2,
            Some(Self::File) => 3,
        }
    }

    /// The preference with a number.
    ///
    /// # Errors
    /// [`BodyError`] if it means nothing.
    pub const fn of(number: u16) -> Result<Option<Self>, BodyError> {
        match number {
            0 => Ok(None),
            1 => Ok(Some(Self::Dram)),
            2 => Ok(Some(Self::Compressed)),
            3 => Ok(Some(Self::File)),
            value => Err(BodyError::Value { field: "tier", value: value as u64 }),
        }
    }
}

/// What a page that was never written holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source<'a> {
    /// Nothing: to read it is refused. So it is with the regions of pagers.
    Nothing,
    /// One byte, over and over.
    Fill(u8),
    /// What a file of the server holds from an offset on.
    File {
        /// The file, as the server names it.
        path: &'a str,
        /// First byte of the file that belongs to the region; a multiple of the page size.
        offset: u64,
    },
    /// What a named region of another memory server holds from an offset on.
    Server {
        /// The other server, as this one reaches it: HOST:PORT or unix:PATH.
        address: &'a str,
        /// The region there.
        region: &'a str,
        /// First byte of it that belongs to this one; a multiple of the page size.
        offset: u64,
        /// Whether what is written is flushed there.
        writes_back: bool,
    },
}

/// Makes a region that lives until it is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Create<'a> {
    /// Its name, which no other region of the server has.
    pub name: &'a str,
    /// Its size; a multiple of the page size, and of 4 KiB.
    pub size: ByteCount,
    /// One of [`PAGE_SIZES`].
    pub page_bytes: u32,
    /// What it holds at first.
    pub source: Source<'a>,
    /// The tier in which it is to be kept; `None`: where its use puts it.
    pub prefers: Option<Tier>,
}

impl<'a> Create<'a> {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, fill, path, offset, region) = match self.source {
            Source::Nothing => (0_u16, 0_u16, "", 0, ""),
            Source::Fill(fill) => (1, u16::from(fill), "", 0, ""),
            Source::File { path, offset } => (2, 0, path, offset, ""),
            Source::Server { address, region, offset, writes_back } => {
                (3 + u16::from(writes_back), 0, address, offset, region)
            }
        };
        let name = cut(self.name, NAME_BYTES_MAX);
        // The longest texts would not fit into a body together.
        let region = cut(region, NAME_BYTES_MAX);
        let path_bytes_max = if region.is_empty() { PATH_BYTES_MAX } else { ADDRESS_BYTES_MAX };
        let path = cut(path, path_bytes_max);
        out.extend_from_slice(&self.size.get().to_le_bytes());
        out.extend_from_slice(&offset.to_le_bytes());
        out.extend_from_slice(&self.page_bytes.to_le_bytes());
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&fill.to_le_bytes());
        out.extend_from_slice(&Tier::number(self.prefers).to_le_bytes());
        // All were cut far below 64 KiB.
        for text in [name, path, region] {
            out.extend_from_slice(&(text.len() as u16).to_le_bytes());
        }
        for text in [name, path, region] {
            out.extend_from_slice(text.as_bytes());
        }
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError`] if it is cut short, or a field means nothing.
    pub fn decode(body: &'a [u8]) -> Result<Self, BodyError> {
        const FIXED: usize = 32;
        let mut fields = Fields::of(body, FIXED)?;
        let (size, offset, page_bytes) = (fields.u64(), fields.u64(), fields.u32());
        let (kind, fill, prefers) = (fields.u16(), fields.u16(), Tier::of(fields.u16())?);
        let mut length = || usize::from(fields.u16());
        let lengths = [length(), length(), length()];
        let limits = [NAME_BYTES_MAX, PATH_BYTES_MAX, NAME_BYTES_MAX];
        let [name, path, region] = texts(&body[FIXED..], lengths, limits)?;
        let source = match (kind, u8::try_from(fill)) {
            (0, _) => Source::Nothing,
            (1, Ok(fill)) => Source::Fill(fill),
            (1, Err(_)) => {
                return Err(BodyError::Value { field: "fill", value: u64::from(fill) });
            }
            (2, _) => Source::File { path, offset },
            (3 | 4, _) => {
                if path.len() > ADDRESS_BYTES_MAX || region.is_empty() {
                    return Err(BodyError::Value { field: "source", value: u64::from(kind) });
                }
                Source::Server { address: path, region, offset, writes_back: kind == 4 }
            }
            (value, _) => {
                return Err(BodyError::Value { field: "source", value: u64::from(value) });
            }
        };
        Ok(Self { name, size: ByteCount::new(size), page_bytes, source, prefers })
    }
}

/// Makes a named region larger or smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resize {
    /// Its new size; a multiple of the page size, and of 4 KiB.
    pub size: ByteCount,
}

impl Resize {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.size.get().to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        Ok(Self { size: ByteCount::new(Fields::of(body, 8)?.u64()) })
    }
}

/// Deletes a named region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delete {
    /// Whether its copies, if there are any, keep what they share with it. Without, a region that
    /// has copies is not deleted.
    pub keeps_copies: bool,
}

impl Delete {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&u16::from(self.keeps_copies).to_le_bytes());
    }

    /// Reads a body. None at all says nothing of copies.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        if body.is_empty() {
            return Ok(Self { keeps_copies: false });
        }
        Ok(Self { keeps_copies: Fields::of(body, 2)?.u16() & 1 != 0 })
    }
}

/// Forgets the ranges of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Free {
    /// Whether what is pinned is forgotten too, and stays pinned. Without, nothing is forgotten where
    /// anything is pinned.
    pub also_pinned: bool,
}

impl Free {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&u16::from(self.also_pinned).to_le_bytes());
    }

    /// Reads a body. None at all says nothing of pins.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        if body.is_empty() {
            return Ok(Self { also_pinned: false });
        }
        Ok(Self { also_pinned: Fields::of(body, 2)?.u16() & 1 != 0 })
    }
}

/// Says in which tier the ranges of the request are to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefer {
    /// `None`: where their use puts them.
    pub tier: Option<Tier>,
}

impl Prefer {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&Tier::number(self.tier).to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError`] if it is cut short or names no tier.
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        Ok(Self { tier: Tier::of(Fields::of(body, 2)?.u16())? })
    }
}

/// Attaches the connection to a region by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open<'a> {
    /// Whether as its only writer from now on: raises the epoch.
    pub take_over: bool,
    /// The region's name.
    pub name: &'a str,
}

/// Makes a virtual copy of the region of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy<'a> {
    /// Whether what is read is copied too, not only what is written.
    pub on_access: bool,
    /// The copy's name.
    pub name: &'a str,
    /// Where the copy is written back to. `None`: nowhere. Only a server whose reply to hello says so
    /// knows of it, and only in clones.
    pub range: Option<FileRange<'a>>,
}

/// Where a region's range of a file begins; it is as long as the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRange<'a> {
    /// The file, as the server names it; empty: that of the original.
    pub path: &'a str,
    /// Its first byte; a multiple of the page size.
    pub offset: u64,
}

/// Bodies that begin with flags and a name.
fn encode_flagged(flags: u16, name: &str, out: &mut Vec<u8>) {
    let name = cut(name, NAME_BYTES_MAX);
    out.extend_from_slice(&flags.to_le_bytes());
    // Was cut at 255 bytes.
    out.extend_from_slice(&(name.len() as u16).to_le_bytes());
    out.extend_from_slice(name.as_bytes());
}

/// Flags and name, and what comes after them.
fn decode_flagged(body: &[u8]) -> Result<(u16, &str, &[u8]), BodyError> {
    let mut fields = Fields::of(body, 4)?;
    let flags = fields.u16();
    let length = usize::from(fields.u16());
    let [name] = texts(&body[4..], [length], [NAME_BYTES_MAX])?;
    Ok((flags, name, &body[4 + length..]))
}

impl<'a> Open<'a> {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        encode_flagged(u16::from(self.take_over), self.name, out);
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError`] if it is cut short or the name is none.
    pub fn decode(body: &'a [u8]) -> Result<Self, BodyError> {
        decode_flagged(body).map(|(flags, name, _)| Self { take_over: flags & 1 != 0, name })
    }
}

impl<'a> Copy<'a> {
    const ON_ACCESS: u16 = 1;
    const HAS_RANGE: u16 = 2;

    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let on_access = if self.on_access { Self::ON_ACCESS } else { 0 };
        let Some(FileRange { path, offset }) = self.range else {
            return encode_flagged(on_access, self.name, out);
        };
        encode_flagged(on_access | Self::HAS_RANGE, self.name, out);
        let path = cut(path, PATH_BYTES_MAX);
        out.extend_from_slice(&offset.to_le_bytes());
        // Was cut far below 64 KiB.
        out.extend_from_slice(&(path.len() as u16).to_le_bytes());
        out.extend_from_slice(path.as_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError`] if it is cut short or a text is none.
    pub fn decode(body: &'a [u8]) -> Result<Self, BodyError> {
        const FIXED: usize = 10;
        let (flags, name, rest) = decode_flagged(body)?;
        let range = if flags & Self::HAS_RANGE == 0 {
            None
        } else {
            let mut fields = Fields::of(rest, FIXED)?;
            let (offset, length) = (fields.u64(), usize::from(fields.u16()));
            let [path] = texts(&rest[FIXED..], [length], [PATH_BYTES_MAX])?;
            Some(FileRange { path, offset })
        };
        Ok(Self { on_access: flags & Self::ON_ACCESS != 0, name, range })
    }
}

/// Why a range of a file is not to be had: another region has it, or a part of it. Bytes of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenBody {
    /// The range that was asked for.
    pub asked: Range<u64>,
    /// The other region's.
    pub taken: Range<u64>,
    /// The other region.
    pub holder: String,
}

impl TakenBody {
    const FIXED: usize = 4 * 8 + 2;

    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let holder = cut(&self.holder, NAME_BYTES_MAX);
        for number in [self.asked.start, self.asked.end, self.taken.start, self.taken.end] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        // Was cut at 255 bytes.
        out.extend_from_slice(&(holder.len() as u16).to_le_bytes());
        out.extend_from_slice(holder.as_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError`] if it is cut short or the name is none.
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, Self::FIXED)?;
        let asked = fields.u64()..fields.u64();
        let taken = fields.u64()..fields.u64();
        let length = usize::from(fields.u16());
        let [holder] = texts(&body[Self::FIXED..], [length], [NAME_BYTES_MAX])?;
        Ok(Self { asked, taken, holder: holder.to_owned() })
    }
}

/// Where a backup lies on the server's machine, and the region's name when it is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupPlace<'a> {
    /// To back up: whether also what a former backup there holds already. To restore: whether a
    /// region of that name is replaced.
    pub flag: bool,
    /// The name of the region to restore; empty in a request to back up.
    pub name: &'a str,
    /// The directory.
    pub path: &'a str,
}

impl<'a> BackupPlace<'a> {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let name = cut(self.name, NAME_BYTES_MAX);
        let path = cut(self.path, PATH_BYTES_MAX);
        out.extend_from_slice(&u16::from(self.flag).to_le_bytes());
        // Both were cut far below 64 KiB.
        out.extend_from_slice(&(name.len() as u16).to_le_bytes());
        out.extend_from_slice(&(path.len() as u16).to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(path.as_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError`] if it is cut short or a text is none.
    pub fn decode(body: &'a [u8]) -> Result<Self, BodyError> {
        const FIXED: usize = 6;
        let mut fields = Fields::of(body, FIXED)?;
        let flag = fields.u16() & 1 != 0;
        let lengths = [usize::from(fields.u16()), usize::from(fields.u16())];
        let [name, path] = texts(&body[FIXED..], lengths, [NAME_BYTES_MAX, PATH_BYTES_MAX])?;
        Ok(Self { flag, name, path })
    }
}

/// What a server says of a named region. Counts are pages of 4 KiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionInfo {
    /// The region.
    pub region: RegionId,
    /// Its size.
    pub pages: PageCount,
    /// Its page size in bytes.
    pub page_bytes: u32,
    /// Whether it is a snapshot.
    pub is_frozen: bool,
    /// Whether it is made from a file.
    pub is_file: bool,
    /// Whether it is made from a region of another server.
    pub is_server: bool,
    /// Whether what is dirty is written back there.
    pub writes_back: bool,
    /// Whether it is a clone whose own range of the file does not hold yet what it inherited: all of that
    /// counts as dirty until the next flush.
    pub is_unfilled: bool,
    /// Pages that are initialised.
    pub stored: PageCount,
    /// Pages that differ from the backing file.
    pub dirty: PageCount,
    /// Pages that were initialised or written since the last copy was made.
    pub changed: PageCount,
    /// Pages that stay in dram.
    pub pinned: PageCount,
    /// Initialised pages in dram.
    pub dram: PageCount,
    /// Initialised pages in the compressed tier.
    pub compressed: PageCount,
    /// Initialised pages in the file tier.
    pub file: PageCount,
    /// Pages, initialised or not, that are to be kept in dram, compressed, in a file.
    pub preferred: [PageCount; 3],
    /// Its name.
    pub name: String,
    /// The file, or the region of another server, that it is made from; empty if there is none.
    pub source: String,
}

impl RegionInfo {
    const FIXED: usize = 12 * 8 + 4 + 2 + 2 + 2;
    const FROZEN: u16 = 1;
    const FILE: u16 = 2;
    const SERVER: u16 = 4;
    const WRITES_BACK: u16 = 8;
    const UNFILLED: u16 = 16;

    /// Bytes that [`RegionInfo::encode`] appends.
    #[must_use]
    pub fn encoded_bytes(&self) -> usize {
        let [name, source] = self.texts();
        Self::FIXED + name.len() + source.len()
    }

    fn texts(&self) -> [&str; 2] {
        [cut(&self.name, NAME_BYTES_MAX), cut(&self.source, PATH_BYTES_MAX)]
    }

    /// Appends the bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let [name, source] = self.texts();
        let counts = [
            self.pages,
            self.stored,
            self.dirty,
            self.changed,
            self.pinned,
            self.dram,
            self.compressed,
            self.file,
        ];
        let counts = counts.iter().chain(&self.preferred);
        out.extend_from_slice(&self.region.get().to_le_bytes());
        counts.for_each(|count| out.extend_from_slice(&count.get().to_le_bytes()));
        let flags = [
            (self.is_frozen, Self::FROZEN),
            (self.is_file, Self::FILE),
            (self.is_server, Self::SERVER),
            (self.writes_back, Self::WRITES_BACK),
            (self.is_unfilled, Self::UNFILLED),
        ];
        let flags: u16 = flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum();
        out.extend_from_slice(&self.page_bytes.to_le_bytes());
        out.extend_from_slice(&flags.to_le_bytes());
        // Both were cut far below 64 KiB.
        out.extend_from_slice(&(name.len() as u16).to_le_bytes());
        out.extend_from_slice(&(source.len() as u16).to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(source.as_bytes());
    }

    /// Reads one from the front of a body; returns it with its length.
    ///
    /// # Errors
    /// [`BodyError`] if it is cut short or the name is none.
    pub fn decode(body: &[u8]) -> Result<(Self, usize), BodyError> {
        let mut fields = Fields::of(body, Self::FIXED)?;
        let region = RegionId::new(fields.u64());
        let mut count = || PageCount::new(fields.u64());
        let [pages, stored, dirty, changed] = [count(), count(), count(), count()];
        let [pinned, dram, compressed, file] = [count(), count(), count(), count()];
        let preferred = [count(), count(), count()];
        let (page_bytes, flags) = (fields.u32(), fields.u16());
        let lengths = [usize::from(fields.u16()), usize::from(fields.u16())];
        let limits = [NAME_BYTES_MAX, PATH_BYTES_MAX];
        let [name, source] = texts(&body[Self::FIXED..], lengths, limits)?;
        let info = Self {
            region,
            pages,
            page_bytes,
            is_frozen: flags & Self::FROZEN != 0,
            is_file: flags & Self::FILE != 0,
            is_server: flags & Self::SERVER != 0,
            writes_back: flags & Self::WRITES_BACK != 0,
            is_unfilled: flags & Self::UNFILLED != 0,
            stored,
            dirty,
            changed,
            pinned,
            dram,
            compressed,
            file,
            preferred,
            name: name.to_owned(),
            source: source.to_owned(),
        };
        Ok((info, Self::FIXED + lengths.iter().sum::<usize>()))
    }

    /// Reads the body of a reply to list, which is several of them, one after the other.
    ///
    /// # Errors
    /// As [`RegionInfo::decode`].
    pub fn decode_all(mut body: &[u8]) -> Result<Vec<Self>, BodyError> {
        let mut infos = Vec::new();
        while !body.is_empty() {
            let (info, bytes) = Self::decode(body)?;
            infos.push(info);
            body = &body[bytes..];
        }
        Ok(infos)
    }
}

/// Asks for the regions whose ids come after one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct List {
    /// The last region of the list before, 0 at first.
    pub after: RegionId,
}

impl List {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.after.get().to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        Ok(Self { after: RegionId::new(Fields::of(body, 8)?.u64()) })
    }
}

/// How far an operation on ranges has come. A server does a bounded piece of work for one request,
/// so that others are not kept waiting; the client asks for the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Pages that were changed.
    pub changed: PageCount,
    /// The range of the request that comes next, and the page in it; `None` if all is done.
    pub next: Option<(u32, PageIndex)>,
}

impl Progress {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (range, page) = self.next.unwrap_or((u32::MAX, PageIndex::new(0)));
        out.extend_from_slice(&self.changed.get().to_le_bytes());
        out.extend_from_slice(&page.get().to_le_bytes());
        out.extend_from_slice(&range.to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, 20)?;
        let changed = PageCount::new(fields.u64());
        let (page, range) = (PageIndex::new(fields.u64()), fields.u32());
        Ok(Self { changed, next: (range != u32::MAX).then_some((range, page)) })
    }
}

fn cut(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

/// Texts that stand one after the other at the front of `bytes`.
fn texts<const N: usize>(
    bytes: &[u8],
    lengths: [usize; N],
    limits: [usize; N],
) -> Result<[&str; N], BodyError> {
    let mut texts = [""; N];
    let mut rest = bytes;
    for ((text, length), limit) in texts.iter_mut().zip(lengths).zip(limits) {
        if length > limit {
            return Err(BodyError::Value { field: "length of a text", value: length as u64 });
        }
        let short = BodyError::Short { found: bytes.len(), needed: lengths.iter().sum() };
        let (now, later) = rest.split_at_checked(length).ok_or(short)?;
        *text = str::from_utf8(now).map_err(|_| BodyError::Name)?;
        rest = later;
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_round_trip() {
        let name = "región";
        let server = |writes_back| {
            let (address, region) = ("192.0.2.1:7070", name);
            Source::Server { address, region, offset: 512, writes_back }
        };
        for (source, prefers) in [
            (Source::Nothing, None),
            (Source::Fill(0xa5), Some(Tier::Dram)),
            (Source::File { path: "/d/f", offset: 1 << 40 }, Some(Tier::Compressed)),
            (server(false), Some(Tier::File)),
            (server(true), None),
        ] {
            let size = ByteCount::new(1 << 40);
            let create = Create { name, size, page_bytes: 512, source, prefers };
            let mut bytes = Vec::new();
            create.encode(&mut bytes);
            assert_eq!(Create::decode(&bytes), Ok(create));
            for length in 0..bytes.len() {
                assert!(Create::decode(&bytes[..length]).is_err());
            }
        }
        let mut bytes = Vec::new();
        let open = Open { take_over: true, name };
        open.encode(&mut bytes);
        assert_eq!(Open::decode(&bytes), Ok(open));
        let place = BackupPlace { flag: true, name, path: "/b/c" };
        let mut place_bytes = Vec::new();
        place.encode(&mut place_bytes);
        assert_eq!(BackupPlace::decode(&place_bytes), Ok(place));
        assert!(BackupPlace::decode(&place_bytes[..place_bytes.len() - 1]).is_err());
        let copy = Copy { on_access: true, name, range: None };
        assert_eq!(Copy::decode(&bytes), Ok(copy));
        for path in ["", "/d/f"] {
            let copy = Copy { range: Some(FileRange { path, offset: 1 << 40 }), ..copy };
            let mut bytes = Vec::new();
            copy.encode(&mut bytes);
            assert_eq!(Copy::decode(&bytes), Ok(copy));
            for length in 0..bytes.len() {
                assert!(Copy::decode(&bytes[..length]).is_err());
            }
        }
        let (asked, taken) = (4096..8192, 0..u64::MAX);
        let taken = TakenBody { asked, taken, holder: name.to_owned() };
        let mut bytes = Vec::new();
        taken.encode(&mut bytes);
        assert_eq!(TakenBody::decode(&bytes), Ok(taken));
        assert!(TakenBody::decode(&bytes[..bytes.len() - 1]).is_err());
        assert_eq!(Delete::decode(&[]), Ok(Delete { keeps_copies: false }));
        assert_eq!(Free::decode(&[]), Ok(Free { also_pinned: false }));
        for tier in Tier::ALL.map(Some).into_iter().chain([None]) {
            let mut bytes = Vec::new();
            Prefer { tier }.encode(&mut bytes);
            assert_eq!(Prefer::decode(&bytes), Ok(Prefer { tier }));
            assert!(Prefer::decode(&bytes[1..]).is_err());
        }
        assert!(Prefer::decode(&[4, 0]).is_err(), "there is no such tier");
        for next in [None, Some((3, PageIndex::new(77)))] {
            let progress = Progress { changed: PageCount::new(5), next };
            let mut bytes = Vec::new();
            progress.encode(&mut bytes);
            assert_eq!(Progress::decode(&bytes), Ok(progress));
        }
    }

    #[test]
    fn a_list_of_regions_round_trips() {
        let info = |at: u64| RegionInfo {
            region: RegionId::new(at),
            pages: PageCount::new(1 << 28),
            page_bytes: 4096,
            is_frozen: at == 1,
            is_file: at == 2,
            is_server: at == 0,
            writes_back: at == 2,
            is_unfilled: at == 1,
            stored: PageCount::new(6),
            dirty: PageCount::new(1),
            changed: PageCount::new(4),
            pinned: PageCount::new(2),
            dram: PageCount::new(1),
            compressed: PageCount::new(2),
            file: PageCount::new(3),
            preferred: [4, 5, 6].map(PageCount::new),
            name: format!("region {at}"),
            source: "/a".repeat(at as usize),
        };
        let infos: Vec<_> = (0..3).map(info).collect();
        let mut bytes = Vec::new();
        infos.iter().for_each(|info| info.encode(&mut bytes));
        assert_eq!(bytes.len(), infos.iter().map(RegionInfo::encoded_bytes).sum::<usize>());
        assert_eq!(RegionInfo::decode_all(&bytes), Ok(infos));
        assert!(RegionInfo::decode_all(&bytes[1..]).is_err());
    }
}
