//! Pages in a file without a name.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use farmem_region::{
    Checksum, FetchPage, FrameId, Frames, PAGE_SIZE, PageCount, PageIndex, PageRange, RegionId,
    StoreError, StorePage, Version,
};
use farmem_wire::page_checksum;
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

/// Buffers that one call reads or writes at most; the kernel's limit is 1,024.
const SLICES_MAX: usize = 256;

/// What a page must be when it is read back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Kept {
    /// 0: the page is not in the file.
    version: Version,
    checksum: Checksum,
}

/// Pages 0, 1, ... of a region in a file. The file has no name, so that it is gone with the
/// process, however that ends. What must come back is remembered in memory: a disk that returns
/// something else is found out.
#[derive(Debug)]
pub struct SpillFile {
    file: OwnedFd,
    directory: PathBuf,
    kept: Vec<Kept>,
    pages: u64,
}

impl SpillFile {
    /// Makes an empty file in the directory.
    ///
    /// # Errors
    /// [`StoreError::Disk`] if the directory is not there or cannot be written.
    pub fn create(directory: &Path) -> Result<Self, StoreError> {
        let file = open_nameless(directory).map_err(|errno| StoreError::Disk {
            directory: directory.display().to_string(),
            reason: format!("cannot make a file there: {}", io::Error::from(errno)),
        })?;
        Ok(Self { file, directory: directory.to_owned(), kept: Vec::new(), pages: 0 })
    }

    /// Pages that fit in.
    #[must_use]
    pub const fn pages(&self) -> PageCount {
        PageCount::new(self.pages)
    }

    #[cfg(test)]
    pub(super) const fn descriptor(&self) -> &OwnedFd {
        &self.file
    }

    /// Reserves room for more pages, so that a full disk shows now and not when a page must be
    /// saved. File systems that cannot reserve show it then.
    pub(super) fn grow(&mut self, count: PageCount) -> Result<(), StoreError> {
        let start = self.pages * PAGE_SIZE as u64;
        match rustix::fs::fallocate(
            &self.file,
            FallocateFlags::KEEP_SIZE,
            start,
            count.bytes().get(),
        ) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(self.error(errno, count.bytes().get(), "reserve room")),
        }
        self.pages += count.get();
        let length = usize::try_from(self.pages).unwrap_or(usize::MAX);
        self.kept.resize(length, Kept::default());
        Ok(())
    }

    /// Writes pages, all of which come `boundary` pages later in their region.
    pub(super) fn store(
        &mut self,
        boundary: u64,
        pages: &[StorePage],
        frames: &dyn Frames,
    ) -> Result<(), StoreError> {
        let follows = |a: &StorePage, b: &StorePage| a.page.get() + 1 == b.page.get();
        let mut numbers: Vec<FrameId> = Vec::new();
        for run in pages.chunk_by(follows).flat_map(|run| run.chunks(SLICES_MAX)) {
            numbers.clear();
            numbers.extend(run.iter().map(|page| page.frame));
            let mut slices = Vec::with_capacity(run.len());
            frames.gather(&numbers, &mut slices);
            self.write_all(run[0].page.get() - boundary, &mut slices)?;
            for page in run {
                let content = frames.bytes(page.frame);
                let checksum = page_checksum(FILE, page.page, page.version, content);
                let kept = Kept { version: page.version, checksum };
                let at = self.index(boundary, page.page);
                self.kept[at] = kept;
            }
        }
        Ok(())
    }

    /// Reads pages back and checks them.
    pub(super) fn fetch(
        &self,
        boundary: u64,
        pages: &[FetchPage],
        frames: &mut dyn Frames,
    ) -> Result<(), StoreError> {
        let follows = |a: &FetchPage, b: &FetchPage| a.page.get() + 1 == b.page.get();
        let mut numbers: Vec<FrameId> = Vec::new();
        for run in pages.chunk_by(follows).flat_map(|run| run.chunks(SLICES_MAX)) {
            numbers.clear();
            numbers.extend(run.iter().map(|page| page.frame));
            for page in run {
                self.check_version(boundary, page)?;
            }
            let mut slices = Vec::with_capacity(run.len());
            frames.gather_mut(&numbers, &mut slices);
            self.read_all(run[0].page.get() - boundary, &mut slices)?;
            for page in run {
                let kept = self.kept[self.index(boundary, page.page)];
                let content = frames.bytes(page.frame);
                if page_checksum(FILE, page.page, page.version, content) != kept.checksum {
                    return Err(self.wrong(page, "the content does not match its checksum"));
                }
            }
        }
        Ok(())
    }

    /// Forgets pages and gives their room on the disk back.
    pub(super) fn release(&mut self, boundary: u64, range: PageRange) -> Result<(), StoreError> {
        let start = (range.start.get() - boundary).min(self.pages);
        let count = range.count.get().min(self.pages - start);
        if count == 0 {
            return Ok(());
        }
        let first = usize::try_from(start).unwrap_or(usize::MAX);
        let length = usize::try_from(count).unwrap_or(0);
        self.kept[first..first + length].fill(Kept::default());
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (offset, bytes) = (start * PAGE_SIZE as u64, count * PAGE_SIZE as u64);
        match rustix::fs::fallocate(&self.file, flags, offset, bytes) {
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(self.error(errno, bytes, "give room back")),
        }
    }

    fn check_version(&self, boundary: u64, page: &FetchPage) -> Result<(), StoreError> {
        let kept = self.kept[self.index(boundary, page.page)];
        if kept.version == page.version && page.version != Version::new(0) {
            return Ok(());
        }
        Err(self.wrong(page, &format!("version {} is there", kept.version)))
    }

    fn index(&self, boundary: u64, page: PageIndex) -> usize {
        let index = page.get().checked_sub(boundary).filter(|&index| index < self.pages);
        // The caller hands on only pages from the boundary on, and those of its requests lie in
        // what it was granted.
        usize::try_from(index.expect("a page of the file")).expect("it is an index of `kept`")
    }

    fn write_all(&self, page: u64, slices: &mut [io::IoSlice<'_>]) -> Result<(), StoreError> {
        let mut offset = page * PAGE_SIZE as u64;
        let mut slices = slices;
        while !slices.is_empty() {
            match rustix::io::pwritev(&self.file, slices, offset) {
                Ok(bytes) => {
                    offset += bytes as u64;
                    io::IoSlice::advance_slices(&mut slices, bytes);
                }
                Err(Errno::INTR) => {}
                Err(errno) => {
                    let asked = slices.iter().map(|slice| slice.len() as u64).sum();
                    return Err(self.error(errno, asked, "write"));
                }
            }
        }
        Ok(())
    }

    fn read_all(&self, page: u64, slices: &mut [io::IoSliceMut<'_>]) -> Result<(), StoreError> {
        let mut offset = page * PAGE_SIZE as u64;
        let mut slices = slices;
        while !slices.is_empty() {
            match rustix::io::preadv(&self.file, slices, offset) {
                Ok(0) => return Err(self.broken("the file is shorter than it was".to_owned())),
                Ok(bytes) => {
                    offset += bytes as u64;
                    io::IoSliceMut::advance_slices(&mut slices, bytes);
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.error(errno, 0, "read")),
            }
        }
        Ok(())
    }

    fn error(&self, errno: Errno, asked: u64, doing: &str) -> StoreError {
        match errno {
            // FBIG: the limit on file sizes (ulimit -f), or what the file system can address.
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => StoreError::DiskFull {
                directory: self.directory.display().to_string(),
                asked,
                reason: io::Error::from(errno).to_string(),
            },
            _ => self.broken(format!("cannot {doing}: {}", io::Error::from(errno))),
        }
    }

    fn wrong(&self, page: &FetchPage, what: &str) -> StoreError {
        let (number, version) = (page.page, page.version);
        self.broken(format!("page {number} version {version}: {what}; it was not used"))
    }

    fn broken(&self, reason: String) -> StoreError {
        StoreError::Disk { directory: self.directory.display().to_string(), reason }
    }
}

/// The region in the checksums of the file: page, version and content tell its pages apart.
const FILE: RegionId = RegionId::new(0);

fn open_nameless(directory: &Path) -> Result<OwnedFd, Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {}
        result => return result,
    }
    // A file system without nameless files: the name lives for a moment.
    let name = format!("farmem-spill-{}-{:x}", std::process::id(), random_number()?);
    let path = directory.join(name);
    let file = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode)?;
    rustix::fs::unlink(&path)?;
    Ok(file)
}

fn random_number() -> Result<u64, Errno> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}
