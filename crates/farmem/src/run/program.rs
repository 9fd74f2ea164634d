//! The program to run: where it is, and whether it can be paged.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::elf::Executable;

/// Scripts may name scripts; the kernel follows as many.
const SCRIPTS_MAX: usize = 5;

/// Why a program runs without a pager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unpaged {
    /// It has no dynamic loader that could load the preload library.
    Static,
    /// It is for another machine or word size than the preload library.
    Foreign,
    /// It gains rights when it starts, so the loader ignores preload libraries.
    GainsRights,
}

impl fmt::Display for Unpaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Static => "it is a static executable, which loads no preload library",
            Self::Foreign => "it is an executable of another machine or word size",
            Self::GainsRights => {
                "it gains rights when it starts (set-user-id, set-group-id or capabilities), so that \
                 the loader ignores preload libraries"
            }
        })
    }
}

/// Why the program, should it start at all, will not be paged. `None` where it will be or where
/// that cannot be told.
pub(crate) fn unpaged(name: &OsStr) -> Option<Unpaged> {
    let mut path = resolve(name)?;
    for _ in 0..=SCRIPTS_MAX {
        match Executable::inspect(&path).ok()? {
            Executable::Script(interpreter) => path = interpreter,
            Executable::Static => return Some(Unpaged::Static),
            Executable::Foreign => return Some(Unpaged::Foreign),
            Executable::Dynamic => return gains_rights(&path).then_some(Unpaged::GainsRights),
            Executable::Other => return None,
        }
    }
    None
}

/// The file that execvp will find: a name with a slash is a path, any other is looked up.
fn resolve(name: &OsStr) -> Option<PathBuf> {
    let path = Path::new(name);
    if path.components().count() > 1 || path.has_root() {
        return Some(path.to_owned());
    }
    let search = std::env::var_os("PATH")?;
    std::env::split_paths(&search).map(|folder| folder.join(name)).find(|path| {
        rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file()
    })
}

fn gains_rights(path: &Path) -> bool {
    const SET_USER: u32 = 0o4000;
    const SET_GROUP: u32 = 0o2000;
    let Ok(metadata) = path.metadata() else {
        return false;
    };
    let user = rustix::process::geteuid();
    let group = rustix::process::getegid();
    let changes_user = metadata.mode() & SET_USER != 0 && metadata.uid() != user.as_raw();
    let changes_group = metadata.mode() & SET_GROUP != 0 && metadata.gid() != group.as_raw();
    // Capabilities of a file are news to everybody but root.
    let gains_capabilities = !user.is_root()
        && rustix::fs::getxattr(path, "security.capability", &mut [0_u8; 64]).is_ok();
    changes_user || changes_group || gains_capabilities
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_dynamic_program_is_paged_by_name_path_and_through_a_script() {
        let own = std::env::current_exe().unwrap();
        assert_eq!(unpaged(own.as_os_str()), None);
        assert!(resolve(OsStr::new("sh")).unwrap().is_absolute());
        assert_eq!(unpaged(OsStr::new("sh")), None);
        assert_eq!(unpaged(OsStr::new("no-such-program-anywhere")), None);
    }

    #[test]
    fn a_static_program_is_not_even_through_a_script() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("static");
        let mut head = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        head.truncate(4096);
        head[56..58].fill(0);
        std::fs::write(&program, head).unwrap();
        assert_eq!(unpaged(program.as_os_str()), Some(Unpaged::Static));
        let script = folder.path().join("script");
        std::fs::write(&script, format!("#!{} -x\n", program.display())).unwrap();
        assert_eq!(unpaged(script.as_os_str()), Some(Unpaged::Static));
    }

    #[test]
    fn a_program_that_becomes_somebody_else_is_not() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can give a file away");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("other");
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        std::os::unix::fs::chown(&program, Some(1), Some(1)).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o4755)).unwrap();
        assert_eq!(unpaged(program.as_os_str()), Some(Unpaged::GainsRights));
    }
}
