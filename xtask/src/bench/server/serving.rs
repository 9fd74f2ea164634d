//! A memory server of farmem by itself, as an operator starts it, and the commands that it is asked with.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::build::Built;

pub(super) const GIB: u64 = 1 << 30;
pub(super) const PAGE_BYTES: usize = 4096;
/// Longer than any start or restart takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory that goes with this.
pub(super) struct Place(pub(super) PathBuf);

impl Place {
    /// In another directory: `/dev/shm` is in memory, `/var/tmp` on a disk.
    pub(super) fn new(parent: &str) -> anyhow::Result<Self> {
        let path = Path::new(parent).join(format!("farmem-bench-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }

    /// The path of something in it, as an argument.
    pub(super) fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// It ends with this.
pub(super) struct Server {
    program: PathBuf,
    arguments: Vec<String>,
    address: String,
    child: Child,
}

impl Server {
    /// Starts one that listens in `place`, and waits until it answers.
    pub(super) fn start(
        built: &Built,
        place: &Place,
        memory: u64,
        options: &[&str],
    ) -> anyhow::Result<Self> {
        let address = format!("unix:{}", place.path("server"));
        let memory = memory.to_string();
        let arguments = ["serve", "--listen", &address, "--memory", &memory];
        let arguments = arguments.iter().chain(options).map(|word| (*word).to_owned()).collect();
        let program = built.path("farmem");
        let child = spawn(&program, &arguments)?;
        let server = Self { program, arguments, address, child };
        server.wait(&["region", "list"])?;
        Ok(server)
    }

    /// A command that asks it, which prints nothing unless it is told to.
    pub(super) fn farmem(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).args(["--server", &self.address]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs a command that asks it.
    pub(super) fn ask(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let status = self.farmem(arguments).stderr(Stdio::inherit()).status()?;
        ensure!(status.success(), "farmem {} failed", arguments.join(" "));
        Ok(())
    }

    /// Repeats a command until it succeeds.
    fn wait(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let began = Instant::now();
        while !self.farmem(arguments).status()?.success() {
            if began.elapsed() > PATIENCE {
                bail!("the server does not answer");
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// A region of that many bytes, all written, no page like another one.
    pub(super) fn fill(&self, name: &str, bytes: u64) -> anyhow::Result<()> {
        self.ask(&["region", "create", name, "--size", &bytes.to_string()])?;
        let mut write = self.farmem(&["region", "write", name]).stdin(Stdio::piped()).spawn()?;
        let mut input = write.stdin.take().context("no standard input")?;
        let mut block = vec![0x5a_u8; 1 << 20];
        for start in (0..bytes).step_by(block.len()) {
            for (page, content) in (0..).zip(block.chunks_mut(PAGE_BYTES)) {
                content[..8].copy_from_slice(&(start + page).to_le_bytes());
            }
            input.write_all(&block)?;
        }
        drop(input);
        ensure!(write.wait()?.success(), "cannot fill region {name}");
        Ok(())
    }

    /// Kills the server; returns the seconds until another one has answered a request.
    pub(super) fn restart(&mut self, request: &[&str]) -> anyhow::Result<f64> {
        self.child.kill()?;
        self.child.wait()?;
        let began = Instant::now();
        self.child = spawn(&self.program, &self.arguments)?;
        self.wait(request)?;
        Ok(began.elapsed().as_secs_f64())
    }

    /// A field of `/proc/PID/status`, in bytes.
    pub(super) fn status_bytes(&self, field: &str) -> anyhow::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kilobytes = line.and_then(|line| line.split_ascii_whitespace().next());
        Ok(kilobytes.with_context(|| field.to_owned())?.parse::<u64>()? << 10)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Path, arguments: &Vec<String>) -> anyhow::Result<Child> {
    let mut command = Command::new(program);
    let command = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("farmem serve")
}
