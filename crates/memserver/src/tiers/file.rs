//! Pages in a file: the slowest tier.
//!
//! The file has no name, so that nothing of it stays behind. It is written and read past the page
//! cache where the file system can do that: a page that is cold here must not take memory there.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use farmem_region::PAGE_SIZE;
use farmem_transport::{read_at, write_at};
use farmem_vmem::{Arena, Slot};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::config::FileTierConfig;
use crate::journal::lock_patiently;

/// Where in the file a page lies, as a token.
#[derive(Debug)]
#[must_use = "a place that is dropped is never free again"]
pub(crate) struct FilePlace {
    number: u32,
}

impl FilePlace {
    /// Where: neighbours in the file have neighbouring numbers.
    pub(crate) const fn number(&self) -> u32 {
        self.number
    }

    pub(crate) const fn is(&self, other: &Self) -> bool {
        self.number == other.number
    }

    /// A token for a place from before, to be counted by [`FileTier::restore`].
    pub(crate) const fn adopt(number: u32) -> Self {
        Self { number }
    }
}

/// Why a file does not hold what is to lie in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileLacks {
    /// There is none.
    File,
    /// It may not become as long as so many bytes.
    Limit(u64),
    /// It is shorter than so many bytes.
    Content(u64),
}

/// The file, and which of its places are taken.
#[derive(Debug)]
pub(crate) struct FileTier {
    file: OwnedFd,
    places: Mutex<Places>,
}

#[derive(Debug)]
struct Places {
    /// Places that were never used begin here.
    next: u32,
    limit: u32,
    free: Vec<u32>,
    /// Tokens beyond the first one, for places that have any.
    sharers: HashMap<u32, u32>,
}

impl FileTier {
    /// Makes the file, without a name unless it is given one: then it is the one that is there, emptied or made
    /// if `empty`, and locked as long as it is open here or in a process that it was passed to.
    ///
    /// # Errors
    /// If the kernel says no; `ResourceBusy` if another server has it.
    pub(crate) fn create(
        config: &FileTierConfig,
        name: Option<&str>,
        empty: bool,
    ) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let (path, flags) = match name {
            None => (config.directory.clone(), flags | OFlags::TMPFILE),
            Some(name) if empty => {
                let flags = flags | OFlags::CREATE | OFlags::NOFOLLOW;
                (config.directory.join(name), flags)
            }
            Some(name) => (config.directory.join(name), flags | OFlags::NOFOLLOW),
        };
        let mode = Mode::RUSR | Mode::WUSR;
        let direct = rustix::fs::open(&path, flags | OFlags::DIRECT, mode);
        let file = match direct {
            // Not every file system can go past its cache.
            Err(Errno::INVAL) => rustix::fs::open(&path, flags, mode)?,
            other => other?,
        };
        if name.is_some() {
            lock_patiently(&file).map_err(|errno| match errno {
                Errno::WOULDBLOCK => io::Error::from(io::ErrorKind::ResourceBusy),
                errno => errno.into(),
            })?;
            if empty {
                // Not before nobody else has it.
                rustix::fs::ftruncate(&file, 0)?;
            }
        }
        Ok(Self::over(file, config))
    }

    /// A file that another process has made.
    pub(crate) fn over(file: OwnedFd, config: &FileTierConfig) -> Self {
        let limit = config.size.get() / PAGE_SIZE as u64;
        let places = Places {
            next: 0,
            limit: u32::try_from(limit).unwrap_or(u32::MAX),
            free: Vec::new(),
            sharers: HashMap::new(),
        };
        Self { file, places: Mutex::new(places) }
    }

    /// The file, for another process.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Waits until the disk has what was written.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.file)?)
    }

    /// Says how many tokens there are for places from before.
    ///
    /// # Errors
    /// [`FileLacks`] if the file does not reach as far, or may not.
    pub(crate) fn restore(&self, tokens: &HashMap<u32, u32>) -> Result<(), FileLacks> {
        let mut places = self.places();
        let Some(last) = tokens.keys().max() else {
            return Ok(());
        };
        let end = offset(*last) + PAGE_SIZE as u64;
        let bytes = rustix::fs::fstat(&self.file).map_or(0, |about| about.st_size);
        if *last >= places.limit {
            return Err(FileLacks::Limit(end));
        }
        if u64::try_from(bytes).unwrap_or(0) < end {
            return Err(FileLacks::Content(end));
        }
        places.next = last + 1;
        places.free = (0..*last).filter(|number| !tokens.contains_key(number)).collect();
        let shared = tokens.iter().filter(|(_, tokens)| **tokens > 1);
        places.sharers = shared.map(|(number, tokens)| (*number, tokens - 1)).collect();
        Ok(())
    }

    /// Pages that lie here.
    pub(crate) fn pages(&self) -> u64 {
        let places = self.places();
        u64::from(places.next) - places.free.len() as u64
    }

    /// Writes as many of the first pages as there is room for. If there is room, what `begin` returns lives
    /// while they are written.
    ///
    /// # Errors
    /// If the kernel does not write, for example because the disk is full; nothing is taken.
    pub(crate) fn write<T>(
        &self,
        arena: &Arena,
        slots: &[Slot],
        begin: impl FnOnce() -> T,
    ) -> io::Result<Vec<FilePlace>> {
        let numbers = self.places().take(slots.len());
        let _begun = (!numbers.is_empty()).then(begin);
        let mut written = Ok(());
        let mut at = 0;
        for run in numbers.chunk_by(|number, next| *next == number + 1) {
            written = written.and_then(|()| {
                let mut slices = Vec::new();
                arena.gather(&slots[at..at + run.len()], &mut slices);
                write_at(&self.file, &mut slices, offset(run[0]))
            });
            at += run.len();
        }
        if let Err(error) = written {
            self.places().free.extend(numbers);
            return Err(error);
        }
        Ok(numbers.into_iter().map(|number| FilePlace { number }).collect())
    }

    /// Reads the pages at these places, neighbours with one call.
    pub(crate) fn read(
        &self,
        arena: &Arena,
        numbers: &[u32],
        slots: &mut [Slot],
    ) -> io::Result<()> {
        let mut at = 0;
        for run in numbers.chunk_by(|number, next| *next == number + 1) {
            let mut slices = Vec::new();
            arena.gather_mut(&mut slots[at..at + run.len()], &mut slices);
            read_at(&self.file, &mut slices, offset(run[0]))?;
            at += run.len();
        }
        Ok(())
    }

    pub(crate) fn share(&self, place: &FilePlace) -> FilePlace {
        *self.places().sharers.entry(place.number).or_default() += 1;
        FilePlace { number: place.number }
    }

    #[expect(clippy::needless_pass_by_value, reason = "a token is used up")]
    pub(crate) fn give_up(&self, place: FilePlace) {
        let mut places = self.places();
        if let Some(sharers) = places.sharers.get_mut(&place.number) {
            *sharers -= 1;
            if *sharers == 0 {
                places.sharers.remove(&place.number);
            }
            return;
        }
        places.free.push(place.number);
        if places.free.len() == places.next as usize {
            places.free.clear();
            places.next = 0;
            // Fails only if the disk does; then its room stays taken until the end.
            let _ = rustix::fs::ftruncate(&self.file, 0);
        }
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Places {
    /// Up to `count` free places, neighbours if possible.
    fn take(&mut self, count: usize) -> Vec<u32> {
        let fresh = (self.limit - self.next).min(u32::try_from(count).unwrap_or(u32::MAX));
        let mut numbers: Vec<u32> = (self.next..self.next + fresh).collect();
        self.next += fresh;
        let missing = (count - numbers.len()).min(self.free.len());
        numbers.extend(self.free.drain(self.free.len() - missing..));
        numbers
    }
}

fn offset(number: u32) -> u64 {
    u64::from(number) * PAGE_SIZE as u64
}

#[cfg(test)]
mod tests {
    use farmem_region::ByteCount;

    use super::*;

    fn tier(pages: u64) -> (FileTier, Arena, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let size = ByteCount::new(pages * PAGE_SIZE as u64);
        let config = FileTierConfig { directory: directory.path().to_owned(), size };
        (FileTier::create(&config, None, true).unwrap(), Arena::new(512).unwrap(), directory)
    }

    #[test]
    fn cap_14_pages_go_to_the_file_and_back() {
        let (tier, arena, _directory) = tier(20);
        let mut slots = Vec::new();
        assert!(arena.take(30, &mut slots));
        for (byte, slot) in (0..).zip(&mut slots) {
            arena.bytes_mut(slot).fill(byte);
        }
        let places = tier.write(&arena, &slots, || ()).unwrap();
        assert_eq!((places.len(), tier.pages()), (20, 20), "there is no room for more");
        assert!(tier.write(&arena, &slots, || ()).unwrap().is_empty());
        let twice = tier.share(&places[7]);
        // Direct I/O wants memory that begins with a page, as that of slots does.
        let mut into = slots.pop().unwrap();
        for (byte, place) in (0..).zip(places) {
            tier.read(&arena, &[place.number()], std::slice::from_mut(&mut into)).unwrap();
            assert_eq!(*arena.bytes(&into), [byte; PAGE_SIZE]);
            tier.give_up(place);
        }
        assert_eq!(tier.pages(), 1);
        tier.read(&arena, &[twice.number()], std::slice::from_mut(&mut into)).unwrap();
        assert_eq!(*arena.bytes(&into), [7; PAGE_SIZE]);
        tier.give_up(twice);
        assert_eq!(tier.pages(), 0);
        slots.push(into);
        arena.release(slots);
    }
}
