//! Named regions of a memory server: made, listed, copied and deleted, and their pages read and
//! written one message at a time. For people and tools; pagers use [`crate::RemoteStore`].

use std::ops::Range;
use std::time::{Duration, Instant};

use farmem_region::{
    ByteCount, Incarnation, PAGE_SIZE, PageCount, PageIndex, PageRange, RegionId, StoreError,
    Version,
};
use farmem_transport::Endpoint;
use farmem_wire::{
    ADDRESS_BYTES_MAX, Action, Attach, AttachMode, BackupPlace, BodyError, Copy, Create, Delete,
    FileRange, Header, List, NAME_BYTES_MAX, Open, PAGES_PER_MESSAGE_MAX, PATH_BYTES_MAX,
    PageEntry, PartEntry, Prefer, Progress, RangeEntry, RefusalCode, RegionInfo, Resize, Source,
    Tier, page_checksum, part_checksum,
};

use crate::exchange::{Exchange, ExchangeError, Reply};
use crate::kept::{KeptMap, changed, now};
use crate::map::RegionMap;

/// Before a request that was refused as busy is sent again.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
/// How often a reader joins a region again for one request. Each time another writer has taken over.
const JOINS_MAX: u32 = 8;
/// Replies in a row that go on at the same page and changed nothing, until the server is taken for one that lies.
const IN_VAIN_MAX: u32 = 100;

/// What can be done to a range of a region.
#[derive(Debug, Clone, std::marker::Copy, PartialEq, Eq)]
pub enum RangeAction {
    /// Fills what was never written from the region's source.
    Initialise,
    /// Also brings it into dram.
    Prefetch,
    /// Also keeps it there.
    Pin,
    /// Lets it leave again.
    Unpin,
    /// Forgets what was written.
    Invalidate,
    /// Writes what is dirty to the backing file, and waits until the disk has it.
    Flush,
}

impl RangeAction {
    const fn action(self) -> Action {
        match self {
            Self::Initialise => Action::Initialise,
            Self::Prefetch => Action::Prefetch,
            Self::Pin => Action::Pin,
            Self::Unpin => Action::Unpin,
            Self::Invalidate => Action::Invalidate,
            Self::Flush => Action::Flush,
        }
    }
}

/// Makes a named region.
///
/// # Errors
/// [`StoreError`] says why the server refuses, or does not answer in time.
pub fn create(
    server: &Endpoint,
    region: &Create<'_>,
    timeout: Duration,
) -> Result<RegionInfo, StoreError> {
    let make = || {
        name_fits(region.name)?;
        match region.source {
            Source::File { path, .. } => fits("path", path, PATH_BYTES_MAX)?,
            Source::Server { address, region, .. } => {
                fits("server's address", address, ADDRESS_BYTES_MAX)?;
                name_fits(region)?;
            }
            Source::Nothing | Source::Fill(_) => {}
        }
        let mut connection = Connection::open(server, timeout)?;
        let header = Header::request(Action::Create, 0);
        let reply = connection.ask(header, |out| region.encode(out))?;
        connection.info(reply)
    };
    make().map_err(|error| error.into_store_error(server))
}

/// All named regions of a server, in the order in which they were made. Where their pages lie is
/// not told: see [`NamedRegion::show`].
///
/// # Errors
/// As [`create`].
pub fn list(server: &Endpoint, timeout: Duration) -> Result<Vec<RegionInfo>, StoreError> {
    let ask = || {
        let mut connection = Connection::open(server, timeout)?;
        let (mut infos, mut after) = (Vec::new(), RegionId::new(0));
        loop {
            let header = Header::request(Action::List, 0);
            let reply = connection.ask(header, |out| List { after }.encode(out))?;
            let more = RegionInfo::decode_all(connection.exchange.bytes(reply.body));
            let more = more.map_err(|error| bad_body(&error))?;
            let Some(last) = more.last() else {
                return Ok(infos);
            };
            after = last.region;
            infos.extend(more);
        }
    };
    ask().map_err(|error: ExchangeError| error.into_store_error(server))
}

/// Makes a named region from a backup in a directory of the server's machine. It is there as a whole
/// or not at all; a region that has the name is replaced if `replaces` says so.
///
/// # Errors
/// As [`create`].
pub fn restore(
    server: &Endpoint,
    path: &str,
    name: &str,
    replaces: bool,
    timeout: Duration,
) -> Result<RegionInfo, StoreError> {
    let make = || {
        name_fits(name)?;
        fits("path", path, PATH_BYTES_MAX)?;
        let mut connection = Connection::open(server, timeout)?;
        let place = BackupPlace { flag: replaces, name, path };
        let header = Header::request(Action::Restore, 0);
        let reply = connection.ask(header, |out| place.encode(out))?;
        connection.info(reply)
    };
    make().map_err(|error| error.into_store_error(server))
}

/// A named region, attached to by a connection of its own.
#[derive(Debug)]
pub struct NamedRegion {
    server: Endpoint,
    name: String,
    /// Whether it has taken over. If not it only reads, whoever writes.
    is_writer: bool,
    connection: Connection,
    session: Header,
    pages: PageCount,
    /// See [`NamedRegion::unit`].
    unit: Option<u64>,
    /// See [`NamedRegion::keep_map`].
    map: Option<KeptMap>,
}

impl NamedRegion {
    /// Attaches to a region by its name. To write one must take over: whoever wrote before is
    /// refused from then on. Who only reads goes on reading: it joins the region again by itself.
    ///
    /// # Errors
    /// As [`create`].
    pub fn open(
        server: &Endpoint,
        name: &str,
        take_over: bool,
        timeout: Duration,
    ) -> Result<Self, StoreError> {
        let open = || {
            let (connection, session, pages) = attach(server, name, take_over, timeout)?;
            let (server, name) = (server.clone(), name.to_owned());
            let is_writer = take_over;
            Ok(Self { server, name, is_writer, connection, session, pages, unit: None, map: None })
        };
        open().map_err(|error: ExchangeError| error.into_store_error(server))
    }

    /// What only looks at the region, also after another writer has taken over: the region is joined again
    /// then, unless the same name means another region now.
    fn look<T>(
        &mut self,
        mut attempt: impl FnMut(&mut Self) -> Result<T, ExchangeError>,
    ) -> Result<T, StoreError> {
        let mut result = self.mend().and_then(|()| attempt(self));
        for _ in 0..JOINS_MAX {
            match result {
                Err(ExchangeError::Refused(RefusalCode::StaleEpoch, _)) if !self.is_writer => {
                    result = self.join_again().and_then(|()| attempt(self));
                }
                _ => break,
            }
        }
        result.map_err(|error| self.error(error))
    }

    fn join_again(&mut self) -> Result<(), ExchangeError> {
        let timeout = self.connection.timeout;
        let (connection, session, pages) = attach(&self.server, &self.name, false, timeout)?;
        let same = |header: &Header| (header.region, header.incarnation);
        if same(&session) != same(&self.session) {
            return Err(ExchangeError::Refused(RefusalCode::NoRegion, None));
        }
        (self.connection, self.session, self.pages) = (connection, session, pages);
        self.renew_map()
    }

    /// Goes on with another connection if the last one is broken.
    fn mend(&mut self) -> Result<(), ExchangeError> {
        if !self.connection.is_broken {
            return Ok(());
        }
        if !self.is_writer {
            return self.join_again();
        }
        // Whether nobody has taken over meanwhile is for the server to say.
        let mut connection = Connection::open(&self.server, self.connection.timeout)?;
        let attach = Attach { mode: AttachMode::Join, replaces: self.connection.number };
        connection.ask(self.request(Action::Attach), |out| attach.encode(out))?;
        self.connection = connection;
        self.renew_map()
    }

    /// What is known by another connection is not believed: nobody has renewed it.
    fn renew_map(&mut self) -> Result<(), ExchangeError> {
        let Some(map) = &mut self.map else {
            return Ok(());
        };
        map.is_outdated = true;
        self.download()
    }

    /// What tells it from a later region of the same name: the incarnation of its server, and the region's number.
    #[must_use]
    pub const fn identity(&self) -> (Incarnation, RegionId) {
        (self.session.incarnation, self.session.region)
    }

    /// Its size.
    #[must_use]
    pub const fn size(&self) -> ByteCount {
        self.pages.bytes()
    }

    /// Keeps a copy of the region's map from now on: to read what was never written, of a region that has a
    /// fill, costs no question then, but for one in each 300 ms. What the region's writer changes
    /// comes with the answers; what was acknowledged to him is never missed.
    ///
    /// # Errors
    /// As [`create`].
    pub fn keep_map(&mut self) -> Result<(), StoreError> {
        self.look(Self::download)
    }

    fn download(&mut self) -> Result<(), ExchangeError> {
        let Connection { exchange, timeout, .. } = &mut self.connection;
        exchange.accept_news();
        // What came before is in what comes now.
        exchange.take_news();
        let map = RegionMap::download(exchange, &self.session, self.pages, *timeout, true);
        let news = exchange.take_news();
        // Also after a refusal: more replies may come.
        self.connection.is_broken |= map.is_err();
        let mut map = KeptMap::new(map?);
        map.learn(news);
        self.map = Some(map);
        // The region may have another size.
        let reply = self.ask(Action::Show, |_| ())?;
        self.pages = self.connection.info(reply)?.pages;
        Ok(())
    }

    /// Makes the map one that is believed, if there is one and the server says that it may be.
    fn refresh(&mut self) -> Result<(), ExchangeError> {
        if self.map.as_ref().is_some_and(|map| !map.is_believed()) {
            self.ask(Action::Ping, |_| ())?;
        }
        if self.map.as_ref().is_some_and(|map| map.is_outdated) {
            self.download()?;
        }
        Ok(())
    }

    /// A request of the session without entries, of which the map takes what rides on the reply.
    fn ask(
        &mut self,
        action: Action,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> Result<Reply, ExchangeError> {
        let header = self.request(action);
        self.ask_with(header, body)
    }

    fn ask_with(
        &mut self,
        header: Header,
        rest: impl FnOnce(&mut Vec<u8>),
    ) -> Result<Reply, ExchangeError> {
        let reply = self.connection.ask(header, rest);
        if let Some(map) = &mut self.map {
            map.learn(self.connection.exchange.take_news());
            if let Ok(reply) = &reply {
                map.note_lease(&reply.header, self.connection.sent);
            }
        }
        reply
    }

    /// The client's own changes are told to nobody but itself.
    fn note_own(&mut self, start: u64, count: u64, version: Option<Version>) {
        if let Some(map) = &mut self.map {
            map.change(&changed(start, count, version));
        }
    }

    /// All about the region.
    ///
    /// # Errors
    /// As [`create`].
    pub fn show(&mut self) -> Result<RegionInfo, StoreError> {
        self.look(|region| {
            let header = region.request(Action::Show);
            let reply = region.connection.ask(header, |_| ())?;
            region.connection.info(reply)
        })
    }

    /// Makes a virtual copy, frozen or writable.
    ///
    /// # Errors
    /// As [`create`].
    pub fn copy(
        &mut self,
        name: &str,
        is_frozen: bool,
        on_access: bool,
    ) -> Result<RegionInfo, StoreError> {
        let action = if is_frozen { Action::Snapshot } else { Action::Clone };
        self.copy_as(action, &Copy { on_access, name, range: None })
    }

    /// Makes a writable virtual copy of a region that is made from a file, with a range of a file of its
    /// own, to which it is written back. Nothing is written there before its first flush, which then writes
    /// all that the copy holds.
    ///
    /// # Errors
    /// As [`create`]. The range must lie in a file that a region could be made from, and no other
    /// region may have a part of it.
    pub fn copy_with_range(
        &mut self,
        name: &str,
        on_access: bool,
        range: FileRange<'_>,
    ) -> Result<RegionInfo, StoreError> {
        if !self.connection.knows_ranges {
            let code = RefusalCode::Unsupported;
            return Err(self.error(ExchangeError::Refused(code, None)));
        }
        self.copy_as(Action::Clone, &Copy { on_access, name, range: Some(range) })
    }

    fn copy_as(&mut self, action: Action, copy: &Copy<'_>) -> Result<RegionInfo, StoreError> {
        self.look(|region| {
            name_fits(copy.name)?;
            fits("path", copy.range.map_or("", |range| range.path), PATH_BYTES_MAX)?;
            let reply = region.connection.ask(region.request(action), |out| copy.encode(out))?;
            region.connection.info(reply)
        })
    }

    /// Backs the region up, as it is now, to a directory of the server's machine. What a former
    /// backup there holds already is not written again, unless `is_full`. Returns the pages that
    /// were written.
    ///
    /// # Errors
    /// As [`create`]. A former backup there still is, as it was.
    pub fn back_up(&mut self, path: &str, is_full: bool) -> Result<u64, StoreError> {
        let place = BackupPlace { flag: is_full, name: "", path };
        self.look(|region| {
            fits("path", path, PATH_BYTES_MAX)?;
            let header = region.request(Action::Backup);
            let reply = region.connection.ask(header, |out| place.encode(out))?;
            Ok(region.connection.progress(reply)?.changed.get())
        })
    }

    /// Deletes the region with all that it holds. A region that was copied is deleted only if the
    /// copies are to keep what they share with it.
    ///
    /// # Errors
    /// As [`create`]; pages must not be pinned.
    pub fn delete(mut self, keeps_copies: bool) -> Result<(), StoreError> {
        let body = Delete { keeps_copies };
        let deleted = self.mend().and_then(|()| {
            let header = self.request(Action::Delete);
            self.connection.ask(header, |out| body.encode(out)).map(|_| ())
        });
        deleted.map_err(|error| self.error(error))
    }

    /// Makes the region larger or smaller. What lies beyond a smaller size is forgotten.
    ///
    /// # Errors
    /// As [`create`]; no page beyond a smaller size may be pinned.
    pub fn resize(&mut self, size: ByteCount) -> Result<RegionInfo, StoreError> {
        let resized = self.mend().and_then(|()| {
            let header = self.request(Action::Resize);
            let reply = self.connection.ask(header, |out| Resize { size }.encode(out))?;
            self.connection.info(reply)
        });
        let info = resized.map_err(|error| self.error(error))?;
        self.pages = info.pages;
        self.note_own(info.pages.get(), u64::MAX, None);
        Ok(info)
    }

    /// Says in which tier a range is to be kept; `None`: where its use puts it. Pages move a little
    /// later.
    ///
    /// # Errors
    /// As [`create`].
    pub fn prefer(&mut self, tier: Option<Tier>, range: PageRange) -> Result<u64, StoreError> {
        let progress = self.mend().and_then(|()| {
            let header = Header { entries: 1, ..self.request(Action::Prefer) };
            let reply = self.connection.ask(header, |out| {
                RangeEntry(range).encode(out);
                Prefer { tier }.encode(out);
            })?;
            self.connection.progress(reply)
        });
        progress.map(|progress| progress.changed.get()).map_err(|error| self.error(error))
    }

    /// Does something to a range of pages, in as many requests as the server wants. Returns how
    /// many pages were changed.
    ///
    /// # Errors
    /// As [`create`]. What was done before the error stays done.
    pub fn over(&mut self, action: RangeAction, range: PageRange) -> Result<u64, StoreError> {
        let end = range.start.get().saturating_add(range.count.get());
        let (mut start, mut changed, mut in_vain) = (range.start, 0, 0);
        loop {
            let count = PageCount::new(end - start.get());
            let entry = RangeEntry(PageRange { start, count });
            let progress = self.look(|region| {
                let header = Header { entries: 1, ..region.request(action.action()) };
                let reply = region.connection.ask(header, |out| entry.encode(out))?;
                region.connection.progress(reply)
            })?;
            changed = progress.changed.get().saturating_add(changed);
            if action == RangeAction::Invalidate {
                self.note_own(start.get(), count.get(), None);
            }
            match progress.next {
                None => return Ok(changed),
                // A server may need several requests for the first page, but not change nothing for ever.
                Some((_, page))
                    if (start.get()..end).contains(&page.get()) && in_vain < IN_VAIN_MAX =>
                {
                    let is_vain = page == start && progress.changed.get() == 0;
                    in_vain = if is_vain { in_vain + 1 } else { 0 };
                    start = page;
                }
                Some((_, page)) => {
                    let what = format!("it goes on at page {page} of {start} to {end}");
                    return Err(self.error(ExchangeError::BadReply(what)));
                }
            }
        }
    }

    /// Brings what is read first of the region into memory, in the order in which it was: as much as has
    /// room there. Returns how many pages have moved.
    ///
    /// # Errors
    /// As [`create`].
    pub fn prefetch_working_set(&mut self) -> Result<u64, StoreError> {
        self.look(|region| {
            // One that names no range.
            let header = region.request(Action::Prefetch);
            let reply = region.connection.ask(header, |_| ())?;
            Ok(region.connection.progress(reply)?.changed.get())
        })
    }

    /// Reads bytes. What was never written is what the region's source says.
    ///
    /// # Errors
    /// As [`create`]; also if a page is not what its checksum says.
    pub fn read(&mut self, bytes: Range<u64>) -> Result<Vec<u8>, StoreError> {
        if bytes.is_empty() {
            return Ok(Vec::new());
        }
        addressable(bytes.end).map_err(|error| self.error(error))?;
        self.look(|region| region.read_bytes(bytes.clone()))
    }

    fn read_bytes(&mut self, bytes: Range<u64>) -> Result<Vec<u8>, ExchangeError> {
        let unit = self.unit()?;
        let mut content = Vec::new();
        for piece in pieces(bytes, unit) {
            match piece {
                Piece::Pages(bytes) => content.extend(self.read_whole(bytes)?),
                Piece::Part(bytes) => {
                    let (_, part, start) = self.read_part(&bytes, unit)?;
                    let skip = (bytes.start - start) as usize;
                    let count = (bytes.end - bytes.start) as usize;
                    content.extend_from_slice(&part[skip..skip + count]);
                }
            }
        }
        Ok(content)
    }

    /// Bytes of a part of which the region's pages are smaller than 4 KiB, and its version; also
    /// where they begin.
    fn read_part(
        &mut self,
        bytes: &Range<u64>,
        unit: u64,
    ) -> Result<(Version, Vec<u8>, u64), ExchangeError> {
        let (start, end) = (bytes.start / unit * unit, bytes.end.next_multiple_of(unit));
        let count = (end - start) as usize;
        let (page, first) = (start / PAGE_SIZE as u64, (start % PAGE_SIZE as u64) as u16);
        self.refresh()?;
        let fill = self.map.as_ref().filter(|_| page < self.pages.get());
        if let Some(fill) = fill.and_then(|map| map.fill_of(page, page + 1)) {
            return Ok((Version::new(0), vec![fill; count], start));
        }
        // A page of 4 KiB at most.
        let (page, bytes) = (PageIndex::new(page), count as u16);
        let wanted = PartEntry { page, first, bytes, ..PartEntry::default() };
        let header = Header { entries: 1, ..self.request(Action::ReadParts) };
        let reply = self.ask_with(header, |out| wanted.encode(out))?;
        let exchange = &self.connection.exchange;
        let entry = PartEntry::decode_all(exchange.bytes(reply.entries)).next();
        let (content, found) = (exchange.bytes(reply.body), entry.unwrap_or_default());
        let (version, checksum) = (found.version, found.checksum);
        if found != (PartEntry { version, checksum, ..wanted })
            || content.len() != count
            || part_checksum(header.region, page, version, first, content) != checksum
        {
            let what = format!("a part of page {page} is not what its checksum says");
            return Err(ExchangeError::BadReply(what));
        }
        Ok((version, content.to_vec(), start))
    }

    /// Writes less than a page of 4 KiB. False if there is nothing that the rest of it could be.
    fn write_part(&mut self, at: u64, bytes: &[u8], unit: u64) -> Result<bool, ExchangeError> {
        let range = at..at + bytes.len() as u64;
        let (former, mut content, start) = match self.read_part(&range, unit) {
            Err(ExchangeError::Refused(RefusalCode::NoPage, _)) => return Ok(false),
            other => other?,
        };
        let skip = (at - start) as usize;
        content[skip..skip + bytes.len()].copy_from_slice(bytes);
        let (page, first) = (start / PAGE_SIZE as u64, (start % PAGE_SIZE as u64) as u16);
        let (index, version) = (PageIndex::new(page), after(former)?);
        let header = Header { entries: 1, ..self.request(Action::WriteParts) };
        let checksum = part_checksum(header.region, index, version, first, &content);
        let bytes = content.len() as u16;
        let entry = PartEntry { page: index, version, checksum, first, bytes };
        self.ask_with(header, |out| {
            entry.encode(out);
            out.extend_from_slice(&content);
        })?;
        self.note_own(page, 1, Some(version));
        Ok(true)
    }

    /// Bytes of the smallest part that can be read and written by itself: 4 KiB, or the region's page
    /// size if that is smaller and the server knows of it.
    fn unit(&mut self) -> Result<u64, ExchangeError> {
        if let Some(unit) = self.unit {
            return Ok(unit);
        }
        let page = PAGE_SIZE as u64;
        let unit = if self.connection.knows_parts {
            let reply = self.ask(Action::Show, |_| ())?;
            page.min(self.connection.info(reply)?.page_bytes.into()).max(1)
        } else {
            page
        };
        self.unit = Some(unit);
        Ok(unit)
    }

    fn read_whole(&mut self, bytes: Range<u64>) -> Result<Vec<u8>, ExchangeError> {
        let (first, last) = pages_of(&bytes);
        let mut content = Vec::new();
        for start in (first..last).step_by(PAGES_PER_MESSAGE_MAX) {
            let end = last.min(start + PAGES_PER_MESSAGE_MAX as u64);
            self.refresh()?;
            let is_inside = end <= self.pages.get();
            let fill = self.map.as_ref().filter(|_| is_inside);
            if let Some(fill) = fill.and_then(|map| map.fill_of(start, end)) {
                content.resize(content.len() + (end - start) as usize * PAGE_SIZE, fill);
                continue;
            }
            self.read_pages(start, end, &mut content)?;
        }
        let skip = (bytes.start - first * PAGE_SIZE as u64) as usize;
        Ok(content[skip..skip + (bytes.end - bytes.start) as usize].to_vec())
    }

    /// Writes bytes. Pages that are written in part are read before.
    ///
    /// # Errors
    /// As [`NamedRegion::read`]. Nothing is written of what would end past the region; after
    /// another error, what came before it stays written.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let end = at.saturating_add(bytes.len() as u64);
        // Nobody else changes the size of what this client writes.
        if end > self.size().get() {
            return Err(self.error(ExchangeError::Refused(RefusalCode::OutOfBounds, None)));
        }
        let unit = self.mend().and_then(|()| self.unit()).map_err(|error| self.error(error))?;
        for piece in pieces(at..end, unit) {
            let (Piece::Pages(range) | Piece::Part(range)) = &piece;
            let bytes = &bytes[(range.start - at) as usize..(range.end - at) as usize];
            let is_written = match piece {
                Piece::Pages(_) => false,
                Piece::Part(_) => {
                    let written = self.write_part(range.start, bytes, unit);
                    written.map_err(|error| self.error(error))?
                }
            };
            if !is_written {
                self.write_whole(range.start, bytes)?;
            }
        }
        Ok(())
    }

    fn write_whole(&mut self, at: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let written = at..at + bytes.len() as u64;
        let (first, last) = pages_of(&written);
        for start in (first..last).step_by(PAGES_PER_MESSAGE_MAX) {
            let end = last.min(start + PAGES_PER_MESSAGE_MAX as u64);
            let mut content = Vec::new();
            let versions = self.read_or_nothing(start, end, &mut content);
            let versions = versions.map_err(|error| self.error(error))?;
            let origin = start * PAGE_SIZE as u64;
            let (from, to) = (at.max(origin), written.end.min(origin + content.len() as u64));
            content[(from - origin) as usize..(to - origin) as usize]
                .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
            self.write_pages(start, &versions, &content).map_err(|error| self.error(error))?;
        }
        Ok(())
    }

    /// Appends pages to `content`; returns their versions.
    fn read_pages(
        &mut self,
        start: u64,
        end: u64,
        content: &mut Vec<u8>,
    ) -> Result<Vec<Version>, ExchangeError> {
        let count = (end - start) as usize;
        let mut header = self.request(Action::Read);
        // At most `PAGES_PER_MESSAGE_MAX`.
        header.entries = count as u32;
        let reply = self.ask_with(header, |out| {
            for page in (start..end).map(PageIndex::new) {
                PageEntry { page, ..PageEntry::default() }.encode(out);
            }
        })?;
        let entries: Vec<_> =
            PageEntry::decode_all(self.connection.exchange.bytes(reply.entries.clone())).collect();
        let pages = self.connection.exchange.bytes(reply.body);
        let (pages, _) = pages.as_chunks::<PAGE_SIZE>();
        if entries.len() != count || pages.len() != count {
            return Err(ExchangeError::BadReply("it sent other pages".to_owned()));
        }
        for ((entry, page), wanted) in entries.iter().zip(pages).zip(start..) {
            let expected = page_checksum(header.region, entry.page, entry.version, page);
            if entry.page.get() != wanted || entry.checksum != expected {
                let what = format!("page {wanted} is not what its checksum says");
                return Err(ExchangeError::BadReply(what));
            }
            content.extend_from_slice(page);
        }
        Ok(entries.into_iter().map(|entry| entry.version).collect())
    }

    /// As [`NamedRegion::read_pages`]; a page that is not there is zeros to write over.
    fn read_or_nothing(
        &mut self,
        start: u64,
        end: u64,
        content: &mut Vec<u8>,
    ) -> Result<Vec<Version>, ExchangeError> {
        match self.read_pages(start, end, content) {
            Err(ExchangeError::Refused(RefusalCode::NoPage, _)) => {}
            other => return other,
        }
        let mut versions = Vec::new();
        for page in start..end {
            match self.read_pages(page, page + 1, content) {
                Ok(version) => versions.extend(version),
                Err(ExchangeError::Refused(RefusalCode::NoPage, _)) => {
                    content.extend_from_slice(&[0; PAGE_SIZE]);
                    versions.push(Version::new(0));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(versions)
    }

    fn write_pages(
        &mut self,
        start: u64,
        versions: &[Version],
        content: &[u8],
    ) -> Result<(), ExchangeError> {
        let mut header = self.request(Action::Write);
        // At most `PAGES_PER_MESSAGE_MAX` pages.
        header.entries = versions.len() as u32;
        header.payload = content.len() as u32;
        let (pages, _) = content.as_chunks::<PAGE_SIZE>();
        let mut entries = Vec::new();
        for ((page, former), content) in (start..).zip(versions).zip(pages) {
            let (page, version) = (PageIndex::new(page), after(*former)?);
            let checksum = page_checksum(header.region, page, version, content);
            PageEntry { page, version, checksum, slot: 0 }.encode(&mut entries);
        }
        self.connection.send(header, &entries, content)?;
        for (page, former) in (start..).zip(versions) {
            self.note_own(page, 1, Some(after(*former)?));
        }
        Ok(())
    }

    const fn request(&self, action: Action) -> Header {
        let Header { session, region, epoch, incarnation, token, .. } = self.session;
        Header { session, region, epoch, incarnation, token, ..Header::request(action, 0) }
    }

    fn error(&self, error: ExchangeError) -> StoreError {
        error.into_store_error(&self.server)
    }
}

/// A connection that is attached to a named region, what is to be said in its requests, and the
/// region's size.
fn attach(
    server: &Endpoint,
    name: &str,
    take_over: bool,
    timeout: Duration,
) -> Result<(Connection, Header, PageCount), ExchangeError> {
    name_fits(name)?;
    let mut connection = Connection::open(server, timeout)?;
    let header = Header::request(Action::Open, 0);
    let reply = connection.ask(header, |out| Open { take_over, name }.encode(out))?;
    let granted = farmem_wire::GrantedSetup::decode(connection.exchange.bytes(reply.body))
        .map_err(|error| bad_body(&error))?;
    Ok((connection, reply.header, granted.pages))
}

/// A connection on which one request at a time is asked.
#[derive(Debug)]
struct Connection {
    exchange: Exchange,
    /// The server's name for it.
    number: u64,
    timeout: Duration,
    next: u64,
    /// Whether what comes of it may be a part of an earlier reply: after anything but an answer.
    is_broken: bool,
    /// When the last request was sent.
    sent: Duration,
    /// Whether the server knows of parts of pages.
    knows_parts: bool,
    /// Whether clones may have ranges of files.
    knows_ranges: bool,
}

impl Connection {
    fn open(server: &Endpoint, timeout: Duration) -> Result<Self, ExchangeError> {
        let (mut exchange, _, hello) = Exchange::open(server, false, Instant::now() + timeout)?;
        exchange.accept_pages();
        let parts = [Action::ReadParts, Action::WriteParts];
        let knows_parts = parts.iter().all(|action| hello.actions >> action.number() & 1 == 1);
        let knows_ranges = hello.clones_have_ranges;
        let (sent, number) = (Duration::ZERO, hello.connection);
        let (next, is_broken) = (1, false);
        Ok(Self { exchange, number, timeout, next, is_broken, sent, knows_parts, knows_ranges })
    }

    fn note_end<T>(&mut self, result: &Result<T, ExchangeError>) {
        let refused = |error: &ExchangeError| {
            matches!(error, ExchangeError::Refused(..) | ExchangeError::Taken(_))
        };
        self.is_broken |= result.as_ref().is_err_and(|error| !refused(error));
    }

    fn ask(
        &mut self,
        header: Header,
        rest: impl FnOnce(&mut Vec<u8>),
    ) -> Result<Reply, ExchangeError> {
        let mut bytes = Vec::new();
        rest(&mut bytes);
        self.send(header, &bytes, &[])
    }

    /// Asks, and asks again while the server is busy.
    fn send(
        &mut self,
        header: Header,
        entries: &[u8],
        pages: &[u8],
    ) -> Result<Reply, ExchangeError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            self.next += 1;
            let header = Header { request: self.next, ..header };
            self.exchange.ask(header, |out| out.extend_from_slice(entries));
            self.exchange.append(pages);
            self.sent = now();
            match self.exchange.wait(deadline) {
                Err(ExchangeError::Refused(RefusalCode::Busy, _)) if Instant::now() < deadline => {
                    std::thread::sleep(BUSY_PAUSE);
                }
                other => {
                    self.note_end(&other);
                    return other;
                }
            }
        }
    }

    fn progress(&self, reply: Reply) -> Result<Progress, ExchangeError> {
        Progress::decode(self.exchange.bytes(reply.body)).map_err(|error| bad_body(&error))
    }

    fn info(&self, reply: Reply) -> Result<RegionInfo, ExchangeError> {
        let info = RegionInfo::decode(self.exchange.bytes(reply.body));
        info.map(|(info, _)| info).map_err(|error| bad_body(&error))
    }
}

/// The version of a page that is written over one of this version.
fn after(former: Version) -> Result<Version, ExchangeError> {
    let next = former.get().checked_add(1).map(Version::new);
    next.ok_or_else(|| ExchangeError::BadReply("a page has the last of all versions".to_owned()))
}

fn bad_body(error: &BodyError) -> ExchangeError {
    ExchangeError::BadReply(error.to_string())
}

/// Refuses a text that would be sent cut.
const fn fits(what: &'static str, text: &str, bytes_max: usize) -> Result<(), ExchangeError> {
    let bytes = text.len();
    if bytes > bytes_max {
        return Err(ExchangeError::TooLong { what, bytes, bytes_max });
    }
    Ok(())
}

const fn name_fits(name: &str) -> Result<(), ExchangeError> {
    fits("region's name", name, NAME_BYTES_MAX)
}

/// Refuses bytes that lie in no page that has a number.
const fn addressable(end: u64) -> Result<(), ExchangeError> {
    if end > u64::MAX - PAGE_SIZE as u64 {
        return Err(ExchangeError::Refused(RefusalCode::OutOfBounds, None));
    }
    Ok(())
}

/// Bytes that are read or written with one kind of request.
enum Piece {
    /// In pages of 4 KiB, all of each if the region's pages are smaller.
    Pages(Range<u64>),
    /// Less than one of 4 KiB.
    Part(Range<u64>),
}

/// Divides bytes, in a region whose smallest part has so many.
fn pieces(bytes: Range<u64>, unit: u64) -> impl Iterator<Item = Piece> {
    const PAGE: u64 = PAGE_SIZE as u64;
    let mut at = bytes.start;
    std::iter::from_fn(move || {
        let start = at;
        if start >= bytes.end {
            return None;
        }
        let whole = bytes.end / PAGE * PAGE;
        // What would be all of a page in such parts is read as one.
        let page_end = (start / PAGE + 1) * PAGE;
        let end = bytes.end.min(page_end);
        let is_all =
            start / unit * unit == page_end - PAGE && end.next_multiple_of(unit) == page_end;
        if unit >= PAGE {
            at = bytes.end;
            Some(Piece::Pages(start..bytes.end))
        } else if start.is_multiple_of(PAGE) && whole > start {
            at = whole;
            Some(Piece::Pages(start..whole))
        } else {
            at = end;
            Some(if is_all { Piece::Pages(start..end) } else { Piece::Part(start..end) })
        }
    })
}

/// The pages that bytes lie in.
const fn pages_of(bytes: &Range<u64>) -> (u64, u64) {
    (bytes.start / PAGE_SIZE as u64, bytes.end.div_ceil(PAGE_SIZE as u64))
}
