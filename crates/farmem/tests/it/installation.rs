//! A farmem in a folder of its own, beside an empty preload library and an empty static pager.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The folder, removed in the end.
#[derive(Debug)]
pub(crate) struct Installation {
    folder: tempfile::TempDir,
}

impl Installation {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // A link would not do: farmem looks beside the file that it is.
        let farmem = env!("CARGO_BIN_EXE_farmem");
        let own = folder.path().join("farmem");
        if fs::hard_link(farmem, &own).is_err() {
            fs::copy(farmem, &own).unwrap();
        }
        let installation = Self { folder };
        installation.compile("libfarmem_preload.so", "-shared", "");
        installation.compile("farmem-pagerd", "-static", "void _start(void) { for (;;) ; }");
        installation
    }

    /// Compiles a C text without any library.
    pub(crate) fn compile(&self, name: &str, kind: &str, text: &str) -> PathBuf {
        let source = self.folder.path().join("source.c");
        fs::write(&source, text).unwrap();
        let output = self.folder.path().join(name);
        let status = Command::new("cc")
            .args([kind, "-nostdlib", "-o"])
            .args([&output, &source])
            .status()
            .unwrap();
        assert!(status.success());
        output
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A link to the folder under another name, for tests that need one.
    pub(crate) fn link(&self, target: &Path, name: &str) -> PathBuf {
        let link = self.folder.path().join(name);
        symlink(target, &link).unwrap();
        link
    }

    /// `farmem` with these arguments; nothing of the caller's farmem environment reaches it.
    pub(crate) fn farmem<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Command {
        let mut command = Command::new(self.folder.path().join("farmem"));
        command.args(arguments).stdin(Stdio::null()).env_remove("LD_PRELOAD");
        // Folders that farmem makes go with the installation.
        command.env("TMPDIR", self.folder.path());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("FARMEM_") {
                command.env_remove(name);
            }
        }
        command
    }
}

/// Runs to the end.
pub(crate) fn output(mut command: Command) -> Output {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}
