//! What a server keeps: how soon another process serves what one held that was killed, and how fast
//! a region goes to a backup.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Serialize;

use crate::build::Built;

const GIB: u64 = 1 << 30;
/// What the server has lent when it is killed, if the machine has room for that and for the rest...
const LENT: u64 = 8 * GIB;
/// ...or else.
const LENT_LEAST: u64 = 4 * GIB;
/// The region that is backed up, which is part of it.
const BACKED_UP: u64 = GIB;
/// Rounds, of which the median counts.
const ROUNDS: usize = 3;
/// Longer than any restart takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was found.
#[derive(Debug, Serialize)]
pub(crate) struct Keeping {
    /// Bytes that the killed server held.
    pub(crate) lent_bytes: u64,
    /// From the start of another process to the answer to its first read, each round.
    pub(crate) restart_seconds: Vec<f64>,
    pub(crate) backup_bytes_per_second: Vec<f64>,
    /// Of a file of the same length in the same directory, with fsync, by large writes.
    pub(crate) stream_bytes_per_second: Vec<f64>,
}

impl Keeping {
    /// Measures in a directory of the machine's memory, which is empty again afterwards.
    pub(crate) fn measure(built: &Built, quick: bool) -> anyhow::Result<Self> {
        let place = Place::new()?;
        let available = available()?;
        let lent = match quick {
            true => GIB / 4,
            false if available > LENT + 4 * GIB => LENT,
            false => LENT_LEAST,
        };
        let backed_up = BACKED_UP.min(lent);
        let mut server = Server::start(built, &place, lent)?;
        server.fill("big", lent - backed_up)?;
        server.fill("part", backed_up)?;
        let mut found = Self {
            lent_bytes: lent,
            restart_seconds: Vec::new(),
            backup_bytes_per_second: Vec::new(),
            stream_bytes_per_second: Vec::new(),
        };
        for _ in 0..if quick { 1 } else { ROUNDS } {
            found.restart_seconds.push(server.restart()?);
            found.stream_bytes_per_second.push(stream(&place.0.join("stream"), backed_up)?);
            found.backup_bytes_per_second.push(server.back_up("part", backed_up)?);
        }
        Ok(found)
    }
}

/// A directory in memory.
struct Place(PathBuf);

impl Place {
    fn new() -> anyhow::Result<Self> {
        let path = PathBuf::from(format!("/dev/shm/farmem-bench-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Server {
    program: PathBuf,
    arguments: Vec<String>,
    address: String,
    place: PathBuf,
    child: Child,
}

impl Server {
    fn start(built: &Built, place: &Place, lent: u64) -> anyhow::Result<Self> {
        let address = format!("unix:{}", place.0.join("server").display());
        let path = place.0.display().to_string();
        let memory = (lent + GIB / 4).to_string();
        let data = format!("{path}/data");
        let arguments = ["serve", "--listen", &address, "--memory", &memory, "--data", &data]
            .into_iter()
            // For the snapshot that a backup is made from.
            .chain(["--promise-ratio", "2", "--allow-dir", &path])
            .map(str::to_owned)
            .collect::<Vec<_>>();
        let program = built.path("farmem");
        let child = spawn(&program, &arguments)?;
        let server = Self { program, arguments, address, place: place.0.clone(), child };
        server.wait(&["region", "list"])?;
        Ok(server)
    }

    fn farmem(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).args(["--server", &self.address]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
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
    fn fill(&self, name: &str, bytes: u64) -> anyhow::Result<()> {
        let size = bytes.to_string();
        let made = self.farmem(&["region", "create", name, "--size", &size]).status()?;
        ensure!(made.success(), "cannot make region {name}");
        let mut write = self.farmem(&["region", "write", name]).stdin(Stdio::piped()).spawn()?;
        let mut input = write.stdin.take().context("no standard input")?;
        let mut block = vec![0x5a_u8; 1 << 20];
        for start in (0..bytes).step_by(block.len()) {
            for (page, content) in (0..).zip(block.chunks_mut(4096)) {
                content[..8].copy_from_slice(&(start + page).to_le_bytes());
            }
            input.write_all(&block)?;
        }
        drop(input);
        ensure!(write.wait()?.success(), "cannot fill region {name}");
        Ok(())
    }

    /// Kills the server; returns the seconds until another one has answered a read.
    fn restart(&mut self) -> anyhow::Result<f64> {
        self.child.kill()?;
        self.child.wait()?;
        let began = Instant::now();
        self.child = spawn(&self.program, &self.arguments)?;
        self.wait(&["region", "read", "part", "--range", "1MiB:4KiB"])?;
        Ok(began.elapsed().as_secs_f64())
    }

    fn back_up(&self, name: &str, bytes: u64) -> anyhow::Result<f64> {
        let path = self.place.join("backup");
        let began = Instant::now();
        let text = path.display().to_string();
        let made = self.farmem(&["region", "backup", name, &text]).status()?;
        ensure!(made.success(), "cannot back up region {name}");
        let rate = bytes as f64 / began.elapsed().as_secs_f64();
        fs::remove_dir_all(&path)?;
        Ok(rate)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Path, arguments: &[String]) -> anyhow::Result<Child> {
    let mut command = Command::new(program);
    let command = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("farmem serve")
}

/// Bytes a second at which the directory takes a file.
fn stream(path: &Path, bytes: u64) -> anyhow::Result<f64> {
    let block = vec![0x5a_u8; 1 << 20];
    let began = Instant::now();
    let mut file = File::create(path)?;
    for _ in (0..bytes).step_by(block.len()) {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    let rate = bytes as f64 / began.elapsed().as_secs_f64();
    drop(file);
    fs::remove_file(path)?;
    Ok(rate)
}

/// Bytes of memory that are available.
fn available() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let words =
        line.and_then(|line| line.split_ascii_whitespace().next()).context("MemAvailable")?;
    Ok(words.parse::<u64>()? << 10)
}
