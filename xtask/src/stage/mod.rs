//! Runs one program in one of the ways that are compared: natively, under farmem, or with its
//! memory limited and the kernel swapping. Everything that a run starts or switches on ends with
//! it, also when it fails or is interrupted.

mod group;
mod kernel_swap;
mod peaks;

use std::fmt;
use std::fs::{self, File, Permissions};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use clap::ValueEnum;
use serde::Serialize;

use crate::build::Built;
use group::{Group, command_inside};
use kernel_swap::{SwapPlace, SwitchedOn};
pub(crate) use peaks::{Add, Peak};
use peaks::{SumWatch, Watch};

/// How a program is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Variant {
    /// As it is, with all the memory that it wants.
    Native,
    /// `farmem run` with its private server over a Unix socket.
    Unix,
    /// `farmem run` with a server over TCP loopback.
    Tcp,
    /// Limited by a control group, the kernel swapping to compressed memory.
    Zram,
    /// Limited by a control group, the kernel swapping to a file.
    SwapFile,
}

impl Variant {
    pub(crate) const ALL: [Self; 5] =
        [Self::Native, Self::Unix, Self::Tcp, Self::Zram, Self::SwapFile];

    pub(crate) const fn is_farmem(self) -> bool {
        matches!(self, Self::Unix | Self::Tcp)
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Unix => "farmem unix",
            Self::Tcp => "farmem tcp",
            Self::Zram => "zram",
            Self::SwapFile => "swap file",
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where a program runs that must not depend on where and how we were started.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) folder: PathBuf,
    pub(crate) environment: Vec<(&'static str, String)>,
}

/// A program to run.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// The command.
    pub(crate) command: Vec<String>,
    /// What the process that is watched for its memory is called; any of them if it has no name.
    pub(crate) watched: Option<&'static str>,
    /// Standard input; nothing if none.
    pub(crate) input: Option<PathBuf>,
    /// Who runs it, and farmem: a user who is not root, with the one capability that paging needs. As
    /// we are if none.
    pub(crate) user: Option<&'static str>,
    /// Where it runs, and the whole of its environment; as we do if none.
    pub(crate) place: Option<Place>,
    /// How long it may take at most.
    pub(crate) patience: Duration,
}

impl Program {
    pub(crate) fn new(watched: &'static str, command: impl IntoIterator<Item = String>) -> Self {
        let patience = Duration::from_secs(600);
        Self {
            command: command.into_iter().collect(),
            watched: Some(watched),
            input: None,
            user: None,
            place: None,
            patience,
        }
    }

    #[must_use]
    pub(crate) fn reading(mut self, input: &Path) -> Self {
        self.input = Some(input.to_owned());
        self
    }
}

/// Where programs are run.
pub(crate) struct Stage {
    built: Built,
    scratch: tempfile::TempDir,
    zram: Result<SwapPlace, String>,
    swap_file: Result<SwapPlace, String>,
    interrupted: Arc<AtomicBool>,
}

impl Stage {
    /// Prepares to run programs in the ways of `variants`, with scratch files in `folder`, which
    /// must lie on a disk. What this machine does not permit is skipped later, with the reason.
    pub(crate) fn prepare(
        built: Built,
        folder: &Path,
        variants: &[Variant],
    ) -> anyhow::Result<Self> {
        /// Holds the largest program of the benchmark, GNU sort of 1.5 GiB, twice.
        const SWAP_BYTES: u64 = 5 << 30;
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))
                .context("catch interrupts, to clean up")?;
        }
        let wanted = |variant, place: &dyn Fn() -> anyhow::Result<SwapPlace>| {
            if variants.contains(&variant) {
                place().map_err(|error| format!("{error:#}"))
            } else {
                Err("not asked for".to_owned())
            }
        };
        let scratch = tempfile::Builder::new().prefix("farmem-xtask-").tempdir_in(folder);
        Ok(Self {
            built,
            scratch: scratch.with_context(|| format!("make a folder in {}", folder.display()))?,
            zram: wanted(Variant::Zram, &|| SwapPlace::zram(SWAP_BYTES)),
            swap_file: wanted(Variant::SwapFile, &|| SwapPlace::file(folder, SWAP_BYTES)),
            interrupted,
        })
    }

    /// A path for a scratch file.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    pub(crate) fn built(&self, name: &str) -> String {
        self.built.path(name).display().to_string()
    }

    /// Lets the `generate` program write to `file`.
    pub(crate) fn generate(&self, file: &Path, arguments: &[&str]) -> anyhow::Result<()> {
        let output = File::create(file).with_context(|| format!("create {}", file.display()))?;
        let mut command = Command::new(self.built.path("generate"));
        let status = command.args(arguments).stdout(output).status().context("run generate")?;
        ensure!(status.success(), "generate {arguments:?} failed: {status}");
        Ok(())
    }

    /// Why programs cannot be run in this way here, if they cannot.
    pub(crate) fn obstacle(&self, variant: Variant) -> Option<&str> {
        match variant {
            Variant::Native | Variant::Unix | Variant::Tcp => None,
            Variant::Zram => self.zram.as_ref().err().map(String::as_str),
            Variant::SwapFile => self.swap_file.as_ref().err().map(String::as_str),
        }
    }

    /// Starts `program` with `limit_bytes` of local memory.
    pub(crate) fn start(
        &self,
        variant: Variant,
        limit_bytes: u64,
        program: &Program,
    ) -> anyhow::Result<Running<'_>> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        let counting = Group::counting()?;
        let server =
            if variant == Variant::Tcp { Some(Server::start(self, &counting)?) } else { None };
        let place = match variant {
            Variant::Zram => Some(&self.zram),
            Variant::SwapFile => Some(&self.swap_file),
            Variant::Native | Variant::Unix | Variant::Tcp => None,
        };
        let place = place.map(|place| place.as_ref().map_err(|reason| anyhow!("{reason}")));
        let place = place.transpose()?;
        let limiting = place.map(|_| Group::limited(limit_bytes)).transpose()?;
        let swap = place.map(SwapPlace::switch_on).transpose()?;

        let stats_file = variant.is_farmem().then(|| self.scratch("stats.json"));
        let mut words = program.user.map_or_else(Vec::new, become_user);
        if let Some(stats_file) = &stats_file {
            let _ = fs::remove_file(stats_file);
            if let Some(user) = program.user {
                File::create(stats_file).context("create the file of statistics")?;
                give(stats_file, user)?;
            }
            words.extend(self.farmem_run(limit_bytes, stats_file, server.as_ref()));
        }
        self.let_in(program)?;
        let cpu_file = counting.cpu_file().display().to_string();
        words.extend(program.command.iter().map(|word| word.replace("{cpu_file}", &cpu_file)));
        let groups: Vec<&Group> = [&counting].into_iter().chain(&limiting).collect();
        let (output, errors) = (self.scratch("output"), self.scratch("errors"));
        let input = program.input.as_deref().unwrap_or(Path::new("/dev/null"));
        let mut command = command_inside(&groups, &words)?;
        command
            .stdin(File::open(input).context("open the program's input")?)
            .stdout(File::create(&output).context("create the output file")?)
            .stderr(File::create(&errors).context("create the error file")?);
        if let Some(Place { folder, environment }) = &program.place {
            command.current_dir(folder).env_clear().envs(environment.iter().cloned());
        }

        let counting = Arc::new(counting);
        let started = Instant::now();
        let watch = Watch::start(
            Arc::clone(&counting),
            program.watched,
            started + program.patience,
            Arc::clone(&self.interrupted),
        );
        let child = command.spawn().context("start the program")?;
        Ok(Running {
            child,
            started,
            watch,
            server,
            counting,
            limiting,
            swap,
            output,
            errors,
            stats_file,
            stage: self,
        })
    }

    /// Gives the folder of a program to the user who runs it.
    fn let_in(&self, program: &Program) -> anyhow::Result<()> {
        if let (Some(user), Some(place)) = (program.user, &program.place) {
            fs::set_permissions(self.scratch.path(), Permissions::from_mode(0o711))
                .context("let a user in")?;
            give(&place.folder, user)?;
        }
        Ok(())
    }

    /// The words that come before a program to run it under farmem.
    fn farmem_run(
        &self,
        limit_bytes: u64,
        stats_file: &Path,
        server: Option<&Server>,
    ) -> Vec<String> {
        let (local, stats) = (limit_bytes.to_string(), stats_file.display().to_string());
        let farmem = self.built("farmem");
        let mut words = vec![&farmem, "run", "--quiet", "--local", &local, "--stats", &stats];
        if let Some(server) = server {
            words.extend(["--server", &server.address]);
        }
        words.push("--");
        words.into_iter().map(str::to_owned).collect()
    }

    /// Runs `program` to its end.
    pub(crate) fn run(
        &self,
        variant: Variant,
        limit_bytes: u64,
        program: &Program,
    ) -> anyhow::Result<Outcome> {
        self.start(variant, limit_bytes, program)?.finish()
    }
}

/// A program that runs. Fields are dropped in this order: the processes go before the groups
/// and the swap.
pub(crate) struct Running<'a> {
    child: Child,
    started: Instant,
    watch: Watch,
    server: Option<Server>,
    counting: Arc<Group>,
    limiting: Option<Group>,
    swap: Option<SwitchedOn>,
    output: PathBuf,
    errors: PathBuf,
    stats_file: Option<PathBuf>,
    stage: &'a Stage,
}

impl Running<'_> {
    /// Processor time so far of the program and everybody who works for it.
    pub(crate) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        self.counting.cpu_seconds()
    }

    /// Begins to add up the memory of the program and its children.
    pub(crate) fn watch_sum(&self, add: Add) -> SumWatch {
        SumWatch::start(Arc::clone(&self.counting), add)
    }

    /// Whether it still runs; what it said is in the error if not.
    pub(crate) fn ensure_running(&mut self) -> anyhow::Result<()> {
        ensure!(!self.stage.interrupted.load(Ordering::Relaxed), "interrupted");
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the program ended: {status}: {}", self.complaints()),
        }
    }

    /// Waits for its end, which must be a success.
    pub(crate) fn finish(mut self) -> anyhow::Result<Outcome> {
        let outcome = self.wait()?;
        ensure!(!outcome.late, "it took too long and was killed");
        ensure!(outcome.status.success(), "{}: {}", describe(outcome.status), self.complaints());
        ensure!(outcome.stats.is_some() || self.stats_file.is_none(), "it left no statistics");
        Ok(outcome)
    }

    /// Waits for its end, however it ends, and says what was wrong, if it was no success.
    pub(crate) fn describe_end(mut self) -> anyhow::Result<(Outcome, Option<String>)> {
        let outcome = self.wait()?;
        let wrong = match outcome.status {
            _ if outcome.late => Some("it took too long and was killed".to_owned()),
            status if status.success() => None,
            status => Some(format!("{}: {}", describe(status), self.complaints())),
        };
        Ok((outcome, wrong))
    }

    /// Waits for its end, however it ends.
    pub(crate) fn end(mut self) -> anyhow::Result<Outcome> {
        self.wait()
    }

    fn wait(&mut self) -> anyhow::Result<Outcome> {
        let status = self.child.wait().context("wait for the program")?;
        let wall_seconds = self.started.elapsed().as_secs_f64();
        let cpu_seconds = self.counting.cpu_seconds()?;
        ensure!(!self.stage.interrupted.load(Ordering::Relaxed), "interrupted");
        // A supervisor that was killed has left it empty.
        let written = |file: &&PathBuf| file.metadata().is_ok_and(|file| file.len() > 0);
        Ok(Outcome {
            status,
            late: self.watch.is_late(),
            wall_seconds,
            cpu_seconds,
            peak: self.watch.peak(),
            stats: self.stats_file.as_ref().filter(written).map(|f| read_stats(f)).transpose()?,
            output: self.output.clone(),
        })
    }

    fn complaints(&self) -> String {
        let text = fs::read(&self.errors).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(3)..].join("; ")
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.counting.kill();
        // The child is dead or a zombie by now.
        let _ = self.child.wait();
        drop(self.server.take());
        drop(self.limiting.take());
        drop(self.swap.take());
    }
}

/// The words before a command to run it as `user`, who may page, and as fast as root.
fn become_user(user: &str) -> Vec<String> {
    let identity = [format!("--reuid={user}"), format!("--regid={user}")];
    let rest = [
        "--init-groups",
        "--inh-caps=+sys_ptrace,+sys_nice",
        "--ambient-caps=+sys_ptrace,+sys_nice",
    ];
    let words = ["setpriv".to_owned()].into_iter().chain(identity);
    words.chain(rest.map(str::to_owned)).collect()
}

/// Makes `user` the owner of a file or folder and what is in it.
fn give(path: &Path, user: &str) -> anyhow::Result<()> {
    let status = Command::new("chown").args(["-R", &format!("{user}:")]).arg(path).status();
    ensure!(status.context("run chown")?.success(), "chown {} failed", path.display());
    Ok(())
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(3), _) => "WRONG BYTE (status 3)".to_owned(),
        (_, Some(9)) | (Some(137), _) => "killed (out of memory?)".to_owned(),
        _ => status.to_string(),
    }
}

fn read_stats(file: &Path) -> anyhow::Result<serde_json::Value> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parse {}", file.display()))
}

/// How a run went.
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    /// It was killed, as its time was over.
    pub(crate) late: bool,
    pub(crate) wall_seconds: f64,
    /// Of the program and everybody who worked for it.
    pub(crate) cpu_seconds: f64,
    pub(crate) peak: Peak,
    /// What `farmem run --stats` wrote.
    pub(crate) stats: Option<serde_json::Value>,
    /// The file with its standard output.
    pub(crate) output: PathBuf,
}

impl Outcome {
    /// The JSON that a program of ours printed.
    pub(crate) fn report(&self) -> anyhow::Result<serde_json::Value> {
        let text = fs::read_to_string(&self.output).context("read the output")?;
        serde_json::from_str(&text).with_context(|| format!("parse the output {text:?}"))
    }
}

/// A memory server for one run.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    /// Starts it in `group`, so that its processor time counts, and waits until it listens.
    fn start(stage: &Stage, group: &Group) -> anyhow::Result<Self> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let free = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
        let address = free.local_addr()?.to_string();
        drop(free);
        let serve = [&stage.built("farmem"), "serve", "--listen", &address, "--memory", "6GiB"];
        let mut command = command_inside(&[group], &serve.map(str::to_owned))?;
        let errors = stage.scratch("server-errors");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.stderr(File::create(&errors)?).spawn().context("start the server")?;
        let mut server = Self { child, address };
        let started = Instant::now();
        while TcpStream::connect(&server.address).is_err() {
            if let Some(status) = server.child.try_wait()? {
                let said = fs::read_to_string(&errors).unwrap_or_default();
                bail!("farmem serve ended: {status}: {}", said.trim());
            }
            ensure!(started.elapsed() < PATIENCE, "farmem serve does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The group kills what is left of it; this reaps the one that we started.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The digest of a file's content.
pub(crate) fn digest(file: &Path) -> anyhow::Result<String> {
    let output = Command::new("sha256sum").arg(file).output().context("run sha256sum")?;
    ensure!(output.status.success(), "sha256sum {} failed", file.display());
    let text = String::from_utf8(output.stdout).context("output of sha256sum")?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}
