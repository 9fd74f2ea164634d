//! What a server left that cannot be gone on with is set aside, not destroyed: whoever knows what happened may
//! be able to use it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
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
        let [arena, journal] = ["arena", "journal"].map(|name| self.path.join(name));
        let tier = anew.tier.map(|(path, _)| path.to_owned());
        // The journal last: if this is killed in between, it still says that its arena is gone.
        let all: Vec<PathBuf> = std::iter::once(arena).chain(tier).chain([journal]).collect();
        let found: Vec<&PathBuf> = all.iter().filter(|path| path.exists()).collect();
        for path in &found {
            unless_none(fs::remove_file(aside(path))).map_err(failed("remove", &aside(path)))?;
        }
        let has_room = self.has_room(anew);
        if has_room {
            for path in found {
                unless_none(fs::rename(path, aside(path))).map_err(failed("set aside", path))?;
            }
        } else {
            for path in &all {
                // Or what was set aside before this was killed.
                for path in [&aside(path), path] {
                    unless_none(fs::remove_file(path)).map_err(failed("remove", path))?;
                }
            }
        }
        Ok(if has_room {
            "what is left of it is kept in files that end with .lost, until contents are lost again"
        } else {
            "what was left of it is removed: there is no room for new files beside it"
        })
    }

    /// Whether there is room for new files beside what is there, also where they lie on one file system.
    fn has_room(&self, anew: &Anew<'_>) -> bool {
        let tier = anew.tier.and_then(|(path, bytes)| Some((path.parent()?, bytes)));
        let fits = |directory, bytes| room(directory, anew.left).is_some_and(|room| room >= bytes);
        let device = |path| fs::metadata(path).ok().map(|about| about.dev());
        match tier {
            Some((directory, bytes)) if device(directory) == device(&self.path) => {
                fits(&self.path, anew.arena.saturating_add(bytes))
            }
            Some((directory, bytes)) => fits(&self.path, anew.arena) && fits(directory, bytes),
            None => fits(&self.path, anew.arena),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cap_95_what_is_lost_is_kept_if_all_new_files_fit_beside_it() {
        for (tenths, is_kept) in [(4, true), (6, false)] {
            let place = tempfile::tempdir().unwrap();
            let directory = DataDirectory::open(&place.path().join("data")).unwrap();
            let tier = place.path().join("tier");
            let files =
                [directory.path.join("arena"), tier.clone(), directory.path.join("journal")];
            files.iter().for_each(|file| fs::write(file, "former").unwrap());
            // Either one fits alone.
            let bytes = room(place.path(), None).unwrap() / 10 * tenths;
            let anew = Anew { arena: bytes, tier: Some((&tier, bytes)), left: None };
            // As if it had been killed after the first one.
            fs::rename(&files[0], aside(&files[0])).unwrap();
            directory.set_aside(&anew).unwrap();
            for file in &files {
                assert_eq!((file.exists(), aside(file).exists()), (false, is_kept), "{file:?}");
            }
        }
    }
}
