//! The file that a region is made from, and written back to; or the region of another server, which
//! serves as one.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};

use farmem_region::{Incarnation, PAGE_SIZE, PageIndex, PageRange, RegionId};
use farmem_transport::{read_at, write_at};
use farmem_wire::RefusalCode;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};

use crate::journal::FileIdentity;
use crate::neighbour::{Neighbour, Neighbours, Use};
use crate::session::Session;

/// An open file, and the part of it that a region is.
#[derive(Debug)]
pub(crate) struct BackingFile {
    content: Content,
    path: PathBuf,
    /// First byte that belongs to the region.
    offset: u64,
    copies: Arc<Copies>,
    /// Held by whoever writes back, from looking at what is dirty until the disk has it: else one of
    /// two could write what was there before over what the other one has written, or take it for written
    /// when the other one is told that it was not. Also by whoever gives a part of the file up.
    turn: Mutex<()>,
    /// Pages that whoever has the turn is writing just now, in their order.
    writing: Mutex<Vec<PageIndex>>,
}

/// Copies of the regions that are made from a file. They hold what the file held when they were made: before
/// bytes of the file change, those that have not read them yet must.
#[derive(Debug, Default)]
struct Copies(Mutex<Vec<Weak<Mutex<Session>>>>);

/// The copies of each file that is open: it is one file to them, however often it was opened, and in whatever
/// parts.
#[derive(Debug, Default)]
pub(crate) struct OpenFiles(Mutex<HashMap<Which, Weak<Copies>>>);

/// Which file, or region of another server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Which {
    Local { device: u64, identity: (u64, u64) },
    Distant(PathBuf),
}

impl OpenFiles {
    /// Adds one that nobody else has yet.
    pub(crate) fn add(&self, mut file: BackingFile) -> Arc<BackingFile> {
        let which = match &file.content {
            Content::Local { device, identity, .. } => {
                Which::Local { device: *device, identity: *identity }
            }
            Content::Distant(_) => Which::Distant(file.path.clone()),
            // Nothing is ever written there.
            Content::Missing { .. } => return Arc::new(file),
        };
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match open.get(&which).and_then(Weak::upgrade) {
            Some(copies) => file.copies = copies,
            None => {
                open.retain(|_, copies| copies.strong_count() > 0);
                open.insert(which, Arc::downgrade(&file.copies));
            }
        }
        Arc::new(file)
    }
}

/// Pages are being written as long as this is there.
#[derive(Debug)]
pub(crate) struct Writing<'a>(&'a BackingFile);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.pages_in_writing().clear();
    }
}

/// Where its bytes are.
#[derive(Debug)]
enum Content {
    Local {
        file: OwnedFd,
        /// Where its number means this file, as long as it is open.
        device: u64,
        /// When it was born, and its number, whatever its name.
        identity: (u64, u64),
    },
    /// In a region of another server.
    Distant(Box<Neighbour>),
    /// Nowhere: it could not be opened again after a restart.
    Missing {
        /// Which file it was, so that no other one is taken for it after the next restart either.
        identity: FileIdentity,
    },
}

impl BackingFile {
    /// Opens a file that lies inside one of `directories`, whatever links there are on the way.
    ///
    /// # Errors
    /// If it does not, if it cannot be opened for reading and writing, if it is no regular file, or
    /// if it ends before byte `offset + bytes`.
    pub(crate) fn open(
        directories: &[PathBuf],
        path: &str,
        offset: u64,
        bytes: u64,
    ) -> io::Result<Self> {
        let path = Path::new(OsStr::from_bytes(path.as_bytes()));
        let inside = |directory: &PathBuf| {
            path.strip_prefix(directory).ok().map(|rest| (directory.clone(), rest.to_owned()))
        };
        let outside = || io::Error::from(io::ErrorKind::PermissionDenied);
        let (directory, rest) = directories.iter().find_map(inside).ok_or_else(outside)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&directory, flags, Mode::empty())?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let file = rustix::fs::openat2(&directory, &rest, flags, Mode::empty(), resolve)?;
        let stat = rustix::fs::fstat(&file)?;
        let identity = (birth(&file), stat.st_ino);
        let content = Content::Local { file, device: stat.st_dev, identity };
        let opened = Self::over(content, path.to_owned(), offset);
        opened.check(bytes)?;
        Ok(opened)
    }

    /// A region of another server, which is not asked for it yet.
    pub(crate) fn distant(
        neighbours: Option<Neighbours>,
        address: &str,
        region: &str,
        offset: u64,
        identity: FileIdentity,
    ) -> Self {
        let path = format!("server:{address}/{region}").into();
        let first = identity.map(|(one, other)| (Incarnation::new(one), RegionId::new(other)));
        let neighbour = Neighbour::new(neighbours, address, region, first);
        let content = Content::Distant(Box::new(neighbour));
        Self::over(content, path, offset)
    }

    fn over(content: Content, path: PathBuf, offset: u64) -> Self {
        let (copies, turn, writing) = Default::default();
        Self { content, path, offset, copies, turn, writing }
    }

    /// Whether it is a region of another server.
    pub(crate) const fn is_distant(&self) -> bool {
        matches!(self.content, Content::Distant(_))
    }

    /// The region of another server that it is.
    pub(crate) const fn neighbour(&self) -> Option<&Neighbour> {
        match &self.content {
            Content::Distant(neighbour) => Some(neighbour),
            Content::Local { .. } | Content::Missing { .. } => None,
        }
    }

    /// What is answered where it does not do what it should.
    pub(crate) fn refusal(&self, error: &io::Error) -> RefusalCode {
        let is_full =
            matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        match self.content {
            Content::Distant(_) => RefusalCode::SourceAway,
            Content::Local { .. } if is_full => RefusalCode::DiskFull,
            Content::Local { .. } | Content::Missing { .. } => RefusalCode::FileFailed,
        }
    }

    /// A file that cannot be opened any more: whatever is asked of it fails.
    pub(crate) fn missing(path: &str, offset: u64, identity: FileIdentity) -> Self {
        Self::over(Content::Missing { identity }, path.into(), offset)
    }

    /// Which file or region it is, whatever its name; nothing if nobody knows.
    pub(crate) fn identity(&self) -> FileIdentity {
        match &self.content {
            Content::Local { identity, .. } => Some(*identity),
            Content::Missing { identity } => *identity,
            Content::Distant(neighbour) => {
                neighbour.identity().map(|(incarnation, region)| (incarnation.get(), region.get()))
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) const fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the file that a region of such a size is.
    pub(crate) const fn range(&self, bytes: u64) -> Range<u64> {
        self.offset..self.offset.saturating_add(bytes)
    }

    /// The pages of a region made from this that hold bytes of a page of a region made from another part of
    /// the same file; nothing if that is not the same file.
    pub(crate) fn pages_with(&self, other: &Self, page: PageIndex) -> Range<u64> {
        let size = PAGE_SIZE as u64;
        let start = other.offset.saturating_add(page.get().saturating_mul(size));
        let end = start.saturating_add(size);
        if !Arc::ptr_eq(&self.copies, &other.copies) || end <= self.offset {
            return 0..0;
        }
        start.saturating_sub(self.offset) / size..(end - self.offset).div_ceil(size)
    }

    /// Whether both are parts of one file on this machine, by whatever names.
    pub(crate) fn is_same_file(&self, other: &Self) -> bool {
        match (&self.content, &other.content) {
            (
                Content::Local { device, identity, .. },
                Content::Local { device: other, identity: number, .. },
            ) => (device, identity) == (other, number),
            (Content::Missing { .. }, Content::Missing { .. } | Content::Local { .. })
            | (Content::Local { .. }, Content::Missing { .. }) => self.path == other.path,
            (Content::Distant(_), _) | (_, Content::Distant(_)) => false,
        }
    }

    /// As [`BackingFile::take_turn`], after the one who does.
    pub(crate) fn wait_for_turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one write back at a time; `None` while another one does.
    pub(crate) fn take_turn(&self) -> Option<MutexGuard<'_, ()>> {
        match self.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Pages are about to be written, by whoever has the turn, and are in their order. To be called under the
    /// lock of the session whose they are, under which they were looked at.
    pub(crate) fn begin_writing(&self, pages: impl Iterator<Item = PageIndex>) -> Writing<'_> {
        let mut writing = self.pages_in_writing();
        writing.clear();
        writing.extend(pages);
        Writing(self)
    }

    /// Whether any page of a range is being written: it must not be forgotten meanwhile, or what is read from
    /// the file instead would be half of what was there before, and what was forgotten would be there later.
    pub(crate) fn is_writing(&self, range: PageRange) -> bool {
        let writing = self.pages_in_writing();
        let first = writing.partition_point(|page| *page < range.start);
        writing.get(first).is_some_and(|page| page.get() - range.start.get() < range.count.get())
    }

    fn pages_in_writing(&self) -> MutexGuard<'_, Vec<PageIndex>> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if a region of so many bytes would not fit in.
    ///
    /// # Errors
    /// Also if it cannot be looked at.
    pub(crate) fn check(&self, bytes: u64) -> io::Result<()> {
        let end = self.offset.checked_add(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        match &self.content {
            Content::Local { file, .. } => check_end(file, end),
            Content::Distant(neighbour) => {
                if neighbour.with(Use::Read, |region| region.size())? < end {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(())
            }
            Content::Missing { .. } => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Remembers a copy, which needs to be told before the file changes.
    pub(crate) fn add_copy(&self, copy: Weak<Mutex<Session>>) {
        let mut copies = self.copies.0.lock().unwrap_or_else(PoisonError::into_inner);
        copies.retain(|copy| copy.strong_count() > 0);
        copies.push(copy);
    }

    /// The copies of all parts of the file that still are.
    pub(crate) fn copies(&self) -> Vec<Arc<Mutex<Session>>> {
        let copies = self.copies.0.lock().unwrap_or_else(PoisonError::into_inner);
        copies.iter().filter_map(Weak::upgrade).collect()
    }

    /// Fills buffers from a byte of the region on.
    ///
    /// # Errors
    /// If the file is shorter than that now, or the kernel does not read.
    pub(crate) fn read(&self, at: u64, slices: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        let start = self.offset + at;
        match &self.content {
            Content::Local { file, .. } => read_at(file, slices, start),
            Content::Distant(neighbour) => {
                let total: usize = slices.iter().map(|slice| slice.len()).sum();
                let wanted = start..start + total as u64;
                let bytes = neighbour.with(Use::Read, |region| region.read(wanted.clone()))?;
                if bytes.len() != total {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let mut rest = &bytes[..];
                for slice in slices {
                    let (now, later) = rest.split_at(slice.len());
                    slice.copy_from_slice(now);
                    rest = later;
                }
                Ok(())
            }
            Content::Missing { .. } => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Writes bytes at a byte of the region. Never makes the file longer.
    ///
    /// # Errors
    /// If the file is shorter than that now, has been removed, or the kernel does not write.
    pub(crate) fn write(&self, at: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let start = self.offset + at;
        match &self.content {
            Content::Local { file, .. } => {
                check_end(file, start + total as u64)?;
                write_at(file, slices, start)
            }
            Content::Distant(neighbour) => {
                let bytes: Vec<u8> =
                    slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                neighbour.with(Use::Write, |region| region.write(start, &bytes))
            }
            Content::Missing { .. } => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Returns when the disk has what was written.
    ///
    /// # Errors
    /// If the disk fails, or if the file has been removed: then nobody would find it.
    pub(crate) fn sync(&self) -> io::Result<()> {
        let file = match &self.content {
            Content::Local { file, .. } => file,
            Content::Distant(neighbour) => {
                return neighbour.with(Use::Write, |region| region.flush());
            }
            Content::Missing { .. } => return Err(io::ErrorKind::NotFound.into()),
        };
        if rustix::fs::fstat(file)?.st_nlink == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(rustix::fs::fsync(file)?)
    }
}

/// Nanoseconds from 1970 to when a file was made; 0 if its file system does not say so.
fn birth(file: &OwnedFd) -> u64 {
    let (flags, wanted) = (AtFlags::EMPTY_PATH, StatxFlags::BTIME);
    let Ok(about) = rustix::fs::statx(file, "", flags, wanted) else { return 0 };
    let at = about.stx_btime;
    // Of an earlier or much later time it is some other number, and always the same one.
    let nanos = at.tv_sec.cast_unsigned().wrapping_mul(1_000_000_000);
    let is_told = about.stx_mask & wanted.bits() != 0;
    if is_told { nanos.wrapping_add(at.tv_nsec.into()) } else { 0 }
}

fn check_end(file: &OwnedFd, end: u64) -> io::Result<()> {
    let stat = rustix::fs::fstat(file)?;
    if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    if u64::try_from(stat.st_size).unwrap_or(0) < end {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn only_files_inside_the_allowed_directories_are_opened() {
        let all = tempfile::tempdir().unwrap();
        let allowed = all.path().join("allowed");
        fs::create_dir_all(allowed.join("deep")).unwrap();
        let outside = all.path().join("secret");
        fs::write(&outside, [1; 8192]).unwrap();
        fs::write(allowed.join("deep/file"), [2; 8192]).unwrap();
        std::os::unix::fs::symlink(&outside, allowed.join("link")).unwrap();
        std::os::unix::fs::symlink("deep/file", allowed.join("near")).unwrap();
        let open = |path: &str, offset, bytes| {
            let path = allowed.join(path);
            let allowed = std::slice::from_ref(&allowed);
            BackingFile::open(allowed, path.to_str().unwrap(), offset, bytes)
        };
        assert!(open("deep/file", 0, 8192).is_ok());
        assert!(open("near", 4096, 4096).is_ok(), "a link that stays inside");
        for wrong in ["link", "../secret", "deep/../../secret", "absent", "deep", ""] {
            assert!(open(wrong, 0, 1).is_err(), "{wrong}");
        }
        assert!(open("deep/file", 4096, 4097).is_err(), "the file ends before");
        assert!(open("deep/file", u64::MAX, 2).is_err());
        let path = outside.to_str().unwrap();
        assert!(BackingFile::open(&[], path, 0, 1).is_err());
    }

    /// It says nothing of devices, whose numbers are others after the next boot or mount.
    #[test]
    fn a_file_is_known_by_when_it_was_made_and_by_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let dirs = [directory.path().to_owned()];
        let [path, other] = ["file", "other"].map(|name| directory.path().join(name));
        let open = |path: &Path| {
            fs::write(path, [7; 4096]).unwrap();
            BackingFile::open(&dirs, path.to_str().unwrap(), 0, 4096).unwrap()
        };
        let file = open(&path);
        let about = fs::metadata(&path).unwrap();
        let born = about.created().ok().map(|at| at.duration_since(std::time::UNIX_EPOCH).unwrap());
        let born = born.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap());
        assert_eq!(file.identity(), Some((born, about.ino())));
        fs::rename(&path, &other).unwrap();
        assert!(open(&other).is_same_file(&file));
        assert!(!open(&path).is_same_file(&file));
    }

    #[test]
    fn a_file_that_was_truncated_is_not_made_longer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, [7; 8192]).unwrap();
        let dirs = [directory.path().to_owned()];
        let file = BackingFile::open(&dirs, path.to_str().unwrap(), 0, 8192).unwrap();
        let mut page = [0; 4096];
        file.read(4096, &mut [IoSliceMut::new(&mut page)]).unwrap();
        assert_eq!(page, [7; 4096]);
        fs::write(&path, [7; 4096]).unwrap();
        assert!(file.read(4096, &mut [IoSliceMut::new(&mut page)]).is_err());
        assert!(file.write(4096, &mut [IoSlice::new(&page)]).is_err());
        file.write(0, &mut [IoSlice::new(&[9; 4096])]).unwrap();
        file.sync().unwrap();
        assert_eq!(fs::read(&path).unwrap(), [9; 4096]);
        fs::remove_file(&path).unwrap();
        assert!(file.sync().is_err(), "nobody would find what was written");
    }
}
