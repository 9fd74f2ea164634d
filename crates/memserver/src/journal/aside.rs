//! What a server left that cannot be gone on with is set aside, not destroyed: whoever knows what happened may
//! be able to use it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{DataDirectory, DataError};
use crate::headroom::MemoryLeft;

/// What statfs calls a file system in memory (linux/magic.h).
const TMPFS: u32 = 0x0102_1994;

/// Files that a new server makes anew, and how long they may become.
pub(crate) struct Anew<'a> {
    /// Bytes of the new arena.
    pub(crate) arena: u64,
    /// The file of the slowest tier, with its bytes.
    pub(crate) tier: Option<(&'a Path, u64)>,
    /// What the control group leaves.
    pub(crate) left: Option<&'a MemoryLeft>,
}

impl DataDirectory {
    /// Renames what a former server has left, in place of what was set aside before; or removes it if there is
    /// no room for new files beside it. Returns which of both.
    ///
    /// # Errors
    /// [`DataError::Io`] if the kernel does not rename it.
    pub(crate) fn set_aside(&self, anew: &Anew<'_>) -> Result<&'static str, DataError> {
        let own = ["arena", "journal"].map(|name| self.path.join(name));
        let tier = anew.tier.map(|(path, _)| path.to_owned());
        // If this is killed in between, the journal still says that its arena is gone.
        let all: Vec<PathBuf> = own.into_iter().chain(tier).filter(|path| path.exists()).collect();
        for path in &all {
            unless_none(fs::remove_file(aside(path))).map_err(failed("remove", &aside(path)))?;
        }
        let tier = anew.tier.iter().filter_map(|(path, bytes)| Some((path.parent()?, *bytes)));
        let has_room = std::iter::once((self.path.as_path(), anew.arena))
            .chain(tier)
            .all(|(directory, bytes)| room(directory, anew.left).is_some_and(|room| room >= bytes));
        for path in &all {
            if has_room {
                unless_none(fs::rename(path, aside(path))).map_err(failed("set aside", path))?;
            } else {
                unless_none(fs::remove_file(path)).map_err(failed("remove", path))?;
            }
        }
        Ok(if has_room {
            "what is left of it is kept in files that end with .lost, until contents are lost again"
        } else {
            "what was left of it is removed: there is no room for new files beside it"
        })
    }
}

/// The name of a file that is set aside.
fn aside(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".lost");
    name.into()
}

/// Bytes that files in a directory may take. `None` if nobody knows.
fn room(directory: &Path, left: Option<&MemoryLeft>) -> Option<u64> {
    let space = rustix::fs::statvfs(directory).ok()?;
    let room = space.f_bavail.saturating_mul(space.f_frsize);
    if rustix::fs::statfs(directory).ok()?.f_type != rustix::fs::FsWord::from(TMPFS) {
        return Some(room);
    }
    let left = left.and_then(MemoryLeft::now).map_or(u64::MAX, |left| left.get());
    Some(room.min(available()?).min(left))
}

/// Bytes that the file system of a directory has for this process. `None` if it does not say so.
pub(super) fn free(directory: &Path) -> Option<u64> {
    let space = rustix::fs::statvfs(directory).ok().filter(|space| space.f_blocks > 0)?;
    let is_root = rustix::process::geteuid().is_root();
    let blocks = if is_root { space.f_bfree } else { space.f_bavail };
    Some(blocks.saturating_mul(space.f_frsize))
}

/// Bytes of memory that the system could give.
fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok().map(|kib: u64| kib << 10)
}

fn unless_none(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> DataError {
    let path = path.to_owned();
    move |source| DataError::Io { what, path: path.clone(), source }
}
