//! The two files that `farmem run` puts under a program, and where they are.

use std::io;
use std::path::{Path, PathBuf};

use crate::elf::Executable;

/// The preload library.
pub(crate) const PRELOAD: &str = "libfarmem_preload.so";
/// The pager.
pub(crate) const PAGERD: &str = "farmem-pagerd";

/// Both files, found and fit for use.
#[derive(Debug)]
pub(crate) struct Artefacts {
    /// The preload library.
    pub(crate) preload: PathBuf,
    /// The pager's static executable.
    pub(crate) pagerd: PathBuf,
}

/// Why one of them cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArtefactError {
    /// The own executable's place is unknown.
    #[error(
        "cannot tell where the farmem executable is: /proc/self/exe is not readable; mount /proc"
    )]
    Own(#[source] io::Error),
    /// It is in none of the places.
    #[error(
        "{name} is neither in {beside} nor in {library}; build it with `cargo xtask build` or copy it there from the same build"
    )]
    Absent {
        /// The file.
        name: &'static str,
        /// The executable's folder.
        beside: String,
        /// The library folder.
        library: String,
    },
    /// The path cannot be handed on.
    #[error(
        "{path} has a space, a colon or a character that is not UTF-8 in its path, which LD_PRELOAD cannot hold; move farmem to another folder"
    )]
    Unspeakable {
        /// The preload library's path.
        path: String,
    },
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// The file.
        path: String,
        /// What reading said.
        #[source]
        source: io::Error,
    },
    /// The pager would need a dynamic loader, which is not there where it is loaded.
    #[error(
        "{path} is not a static executable of this machine; build it with `cargo rustc -p \
         farmem-pagerd --release -- -C target-feature=+crt-static`"
    )]
    NotStatic {
        /// The file.
        path: String,
    },
}

impl Artefacts {
    /// Finds both beside the own executable or in `../lib/farmem`, and checks them.
    ///
    /// # Errors
    /// See [`ArtefactError`]; each message says what to do.
    pub(crate) fn find() -> Result<Self, ArtefactError> {
        let own = std::env::current_exe().map_err(ArtefactError::Own)?;
        let folder = own.parent().unwrap_or(Path::new("/"));
        Self::find_from(folder)
    }

    fn find_from(folder: &Path) -> Result<Self, ArtefactError> {
        let preload = locate(folder, PRELOAD)?;
        let text = preload.to_str().filter(|text| !text.contains([' ', ':']));
        if text.is_none() {
            return Err(ArtefactError::Unspeakable { path: preload.display().to_string() });
        }
        let pagerd = locate(folder, PAGERD)?;
        let path = || pagerd.display().to_string();
        match Executable::inspect(&pagerd) {
            Ok(Executable::Static) => Ok(Self { preload, pagerd }),
            Ok(_) => Err(ArtefactError::NotStatic { path: path() }),
            Err(source) => Err(ArtefactError::Unreadable { path: path(), source }),
        }
    }
}

fn locate(folder: &Path, name: &'static str) -> Result<PathBuf, ArtefactError> {
    let library = folder.join("../lib/farmem");
    let candidates = [folder.join(name), library.join(name)];
    candidates.iter().find_map(|path| path.canonicalize().ok()).ok_or_else(|| {
        ArtefactError::Absent {
            name,
            beside: folder.display().to_string(),
            library: library.display().to_string(),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn both_are_found_in_the_library_folder_and_a_dynamic_pager_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let (binaries, library) = (root.path().join("bin"), root.path().join("lib/farmem"));
        fs::create_dir_all(&binaries).unwrap();
        fs::create_dir_all(&library).unwrap();
        let absent = Artefacts::find_from(&binaries).unwrap_err();
        assert!(absent.to_string().starts_with(PRELOAD), "{absent}");

        fs::write(library.join(PRELOAD), "").unwrap();
        fs::copy(std::env::current_exe().unwrap(), library.join(PAGERD)).unwrap();
        let dynamic = Artefacts::find_from(&binaries).unwrap_err();
        assert!(matches!(dynamic, ArtefactError::NotStatic { .. }), "{dynamic}");

        let mut head = fs::read(std::env::current_exe().unwrap()).unwrap();
        head.truncate(4096);
        // No program header, so none that names a loader.
        head[56..58].fill(0);
        fs::write(library.join(PAGERD), head).unwrap();
        let found = Artefacts::find_from(&binaries).unwrap();
        assert_eq!(found.pagerd, library.join(PAGERD).canonicalize().unwrap());
    }
}
