//! The calls that a backup makes to the kernel, so that tests can let each of them be the last one.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use farmem_transport::write_at;
use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// A directory that holds a backup.
pub(crate) trait Disk: Debug + Sync {
    /// Makes a file that must not be there.
    fn create(&self, name: &str) -> io::Result<OwnedFd>;
    /// The same for whole pages, which go past the kernel's cache where the file system lets them.
    fn create_pages(&self, name: &str) -> io::Result<OwnedFd> {
        self.create(name)
    }
    fn open(&self, name: &str) -> io::Result<OwnedFd>;
    fn write(&self, file: &OwnedFd, slices: &mut [IoSlice<'_>], at: u64) -> io::Result<()>;
    fn sync(&self, file: &OwnedFd) -> io::Result<()>;
    /// Waits until the disk has the directory's names.
    fn sync_names(&self) -> io::Result<()>;
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
    fn names(&self) -> io::Result<Vec<String>>;
}

/// The real thing.
#[derive(Debug)]
pub(crate) struct Folder {
    directory: OwnedFd,
}

impl Folder {
    /// A directory inside one of `allowed`, whatever links there are on the way. It is made if
    /// `create` says so, and locked: for one backup, or for any number of restores.
    ///
    /// # Errors
    /// `PermissionDenied` if it does not lie there, `ResourceBusy` if it is in use.
    pub(crate) fn open(allowed: &[PathBuf], path: &str, create: bool) -> io::Result<Self> {
        let path = Path::new(path);
        let inside = |directory: &PathBuf| {
            path.strip_prefix(directory).ok().map(|rest| (directory.clone(), rest.to_owned()))
        };
        let outside = || io::Error::from(io::ErrorKind::PermissionDenied);
        let (directory, rest) = allowed.iter().find_map(inside).ok_or_else(outside)?;
        let name = rest.file_name().ok_or_else(outside)?;
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let directory = rustix::fs::open(&directory, flags, Mode::empty())?;
        let parent = rest.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let parent = rustix::fs::openat2(&directory, parent, flags, Mode::empty(), resolve)?;
        if create {
            match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
                Ok(()) => rustix::fs::fsync(&parent)?,
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let directory = rustix::fs::openat2(&parent, name, flags, Mode::empty(), resolve)?;
        let how = if create {
            FlockOperation::NonBlockingLockExclusive
        } else {
            FlockOperation::NonBlockingLockShared
        };
        rustix::fs::flock(&directory, how).map_err(|errno| match errno {
            Errno::WOULDBLOCK => io::Error::from(io::ErrorKind::ResourceBusy),
            errno => errno.into(),
        })?;
        Ok(Self { directory })
    }
}

impl Disk for Folder {
    fn create(&self, name: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.directory, name, flags, Mode::RUSR | Mode::WUSR)?)
    }

    fn create_pages(&self, name: &str) -> io::Result<OwnedFd> {
        let file = self.create(name)?;
        // Copying into the cache, from where it goes to the disk, would take longer than a fast disk.
        let _ = set_direct(&file, true);
        Ok(file)
    }

    fn open(&self, name: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        Ok(rustix::fs::openat(&self.directory, name, flags, Mode::empty())?)
    }

    fn write(&self, file: &OwnedFd, slices: &mut [IoSlice<'_>], at: u64) -> io::Result<()> {
        match write_at(file, &mut slices.to_vec(), at) {
            // The file system has larger blocks, or wants another place in memory.
            Err(error)
                if error.kind() == io::ErrorKind::InvalidInput && set_direct(file, false)? =>
            {
                write_at(file, slices, at)
            }
            result => result,
        }
    }

    fn sync(&self, file: &OwnedFd) -> io::Result<()> {
        Ok(rustix::fs::fsync(file)?)
    }

    fn sync_names(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.directory)?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.directory, from, &self.directory, to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())?)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let entries = Dir::read_from(&self.directory)?;
        let name = |entry: Result<rustix::fs::DirEntry, Errno>| {
            entry.map(|entry| entry.file_name().to_string_lossy().into_owned())
        };
        Ok(entries.map(name).collect::<Result<_, _>>()?)
    }
}

/// Whether what is written to a file goes past the kernel's cache; returns whether that is a change.
fn set_direct(file: &OwnedFd, is_direct: bool) -> io::Result<bool> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    let mut wanted = flags;
    wanted.set(OFlags::DIRECT, is_direct);
    if wanted != flags {
        rustix::fs::fcntl_setfl(file, wanted)?;
    }
    Ok(wanted != flags)
}

/// All bytes of a small file.
pub(crate) fn read_all(disk: &dyn Disk, name: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::from(disk.open(name)?).read_to_end(&mut bytes)?;
    Ok(bytes)
}
