//! The memory server of one run: a `farmem serve` of our own on a Unix socket that only this user
//! reaches. It dies with the supervisor.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use rustix::process::Pid;

/// What the server writes to its standard output when it accepts connections.
pub(crate) const READY: &str = "ready\n";

/// Kept free of the 108 bytes of a Unix address for the names below the folder.
const FOLDER_BYTES_MAX: usize = 60;

/// A running private server. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct PrivateServer {
    child: Child,
    /// Holds the socket and nothing else; removed at the end.
    folder: PathBuf,
    /// The child has been waited for, and its process id may be another's.
    ended: bool,
}

impl PrivateServer {
    /// Starts a server that lends `memory_bytes` and waits until it accepts connections.
    pub(crate) fn start(memory_bytes: u64) -> anyhow::Result<Self> {
        let folder = create_folder()?;
        let spawned = spawn(&folder, memory_bytes);
        let child = spawned.inspect_err(|_| {
            let _ = fs::remove_dir(&folder);
        })?;
        let mut server = Self { child, folder, ended: false };
        server.wait_ready()?;
        Ok(server)
    }

    /// Where pagers connect.
    pub(crate) fn address(&self) -> String {
        format!("unix:{}", socket_in(&self.folder).display())
    }

    /// The server's process.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Tells that the process was waited for elsewhere.
    pub(crate) fn has_ended(&mut self) {
        self.ended = true;
    }

    fn wait_ready(&mut self) -> anyhow::Result<()> {
        let mut output = self.child.stdout.take().context("no pipe from the server")?;
        let mut line = [0; READY.len()];
        match output.read_exact(&mut line) {
            Ok(()) if line == READY.as_bytes() => Ok(()),
            // The server's own message is on standard error.
            Ok(()) | Err(_) => bail!("it ended before it was ready"),
        }
    }
}

impl Drop for PrivateServer {
    fn drop(&mut self) {
        if !self.ended {
            // Fails only if it has just died by itself.
            let _ = self.child.kill();
            let _ = farmem_vmem::without_real_time(|| self.child.wait());
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn spawn(folder: &Path, memory_bytes: u64) -> anyhow::Result<Child> {
    let own = std::env::current_exe().context("cannot find the farmem executable")?;
    let mut command = Command::new(own);
    // They speak of servers that somebody operates: this one is as the run wants it.
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_farmems(name)) {
        command.env_remove(name);
    }
    command
        .args(["serve", "--listen"])
        .arg(format!("unix:{}", socket_in(folder).display()))
        .args(["--memory", &memory_bytes.to_string()])
        .args(["--private", &std::process::id().to_string()])
        // The terminal's keys are for the program.
        .process_group(0)
        .env_remove("LD_PRELOAD")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start farmem serve")
}

fn is_farmems(variable: &OsStr) -> bool {
    variable.as_encoded_bytes().starts_with(b"FARMEM_")
}

fn socket_in(folder: &Path) -> PathBuf {
    folder.join("server.sock")
}

/// A new folder that only this user can enter.
fn create_folder() -> anyhow::Result<PathBuf> {
    let short = |base: &PathBuf| base.as_os_str().len() <= FOLDER_BYTES_MAX;
    let base = Some(std::env::temp_dir()).filter(short).unwrap_or_else(|| PathBuf::from("/tmp"));
    let folder = base.join(format!("farmem-{:016x}", super::random()? >> 64));
    let created: io::Result<()> = DirBuilder::new().mode(0o700).create(&folder);
    created.with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}
