//! The servers that are compared, each a process of its own on the same processor.

use std::fmt;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use serde_json::Value;

use super::figures::{Figure, Regions, Way};
use super::serving::Place;
use crate::build::Built;

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Server {
    Farmem,
    Memcached,
    Redis,
}

impl Server {
    pub(crate) const ALL: [Self; 3] = [Self::Farmem, Self::Memcached, Self::Redis];

    /// What `pageload` calls its protocol.
    const fn protocol(self) -> &'static str {
        match self {
            Self::Farmem => "msmp",
            Self::Memcached => "memcached",
            Self::Redis => "redis",
        }
    }

    /// The command that starts it, as Debian ships it; nothing but its size is changed, and that
    /// nothing is written to a disk.
    fn command(self, built: &Built, port: u16, files: &Place) -> Vec<String> {
        let port = port.to_string();
        let words: Vec<&str> = match self {
            Self::Farmem => {
                let program = built.path("farmem").display().to_string();
                let listen = format!("127.0.0.1:{port}");
                // The promise: two regions of 1 TiB in 1 GiB.
                let promise = ["serve", "--memory", "1GiB", "--promise-ratio", "4096"];
                let serve = promise.map(str::to_owned).into_iter();
                let files = ["--allow-dir".into(), files.0.display().to_string()];
                let listen = ["--listen".into(), listen];
                return [program].into_iter().chain(serve).chain(listen).chain(files).collect();
            }
            Self::Memcached => {
                vec!["memcached", "-u", "nobody", "-m", "1024", "-l", "127.0.0.1", "-p", &port]
            }
            Self::Redis => {
                let local = ["redis-server", "--bind", "127.0.0.1", "--port", &port];
                local.into_iter().chain(["--save", "", "--appendonly", "no"]).collect()
            }
        };
        words.into_iter().map(str::to_owned).collect()
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Farmem => "farmem",
            Self::Memcached => "memcached",
            Self::Redis => "redis",
        })
    }
}

/// Why a server is not there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Absence {
    /// This machine has none.
    NotInstalled,
    /// It did not start.
    Failed(String),
}

impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInstalled => f.write_str("not installed"),
            Self::Failed(reason) => write!(f, "failed: {reason}"),
        }
    }
}

/// All servers, which end with this.
pub(crate) struct Contestants {
    running: Vec<(Server, Result<Running, Absence>)>,
    sender: Running,
    pageload: String,
    client_processor: usize,
    /// Where the file is that a region of farmem is made from: in memory, so that no disk is measured.
    files: Place,
}

struct Running {
    child: Child,
    address: SocketAddr,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Contestants {
    /// Starts all of them. Those that are not there are skipped later, with the reason.
    pub(crate) fn start(built: &Built, processors: &[usize]) -> anyhow::Result<Self> {
        let [servers, client_processor] = processors else {
            bail!("name two processors");
        };
        let files = Place::new("/dev/shm")?;
        let running = Server::ALL.map(|server| {
            let command = |port| server.command(built, port, &files);
            if !is_installed(&command(0)[0]) {
                return (server, Err(Absence::NotInstalled));
            }
            let started = start(*servers, command);
            (server, started.map_err(|error| Absence::Failed(format!("{error:#}"))))
        });
        if let (_, Err(reason)) = &running[0] {
            bail!("farmem serve {reason}");
        }
        let pageload = built.path("pageload").display().to_string();
        let sender = start(*servers, |port| {
            [&pageload, "send", "--listen", &format!("127.0.0.1:{port}")].map(str::to_owned).into()
        });
        Ok(Self {
            running: running.into(),
            sender: sender.context("start the plain stream")?,
            pageload,
            client_processor: *client_processor,
            files,
        })
    }

    /// Why servers are not there.
    pub(crate) fn absent(&self) -> impl Iterator<Item = (Server, &Absence)> {
        self.running.iter().filter_map(|(server, running)| Some((*server, running.as_ref().err()?)))
    }

    /// Asks one server in each way; `None` if it is not there.
    pub(crate) fn ask(
        &self,
        server: Server,
        ways: &[Way],
        pages: u64,
        seconds: f64,
    ) -> anyhow::Result<Option<Vec<Figure>>> {
        let found = self.running.iter().find(|(listed, _)| *listed == server);
        let Some((_, Ok(running))) = found else {
            return Ok(None);
        };
        let ways: Vec<String> = ways.iter().map(|way| way.argument()).collect();
        let lines = self.pageload(&[
            "read",
            "--protocol",
            server.protocol(),
            "--server",
            &running.address.to_string(),
            "--process",
            &running.child.id().to_string(),
            "--pages",
            &pages.to_string(),
            "--seconds",
            &seconds.to_string(),
            "--ways",
            &ways.join(","),
        ]);
        let lines = lines.with_context(|| format!("ask {server}"))?;
        let figures = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(Some(figures))
    }

    /// What large empty regions of farmem cost.
    pub(crate) fn regions(&self) -> anyhow::Result<Regions> {
        let found = self.running.iter().find(|(listed, _)| *listed == Server::Farmem);
        let Some((_, Ok(running))) = found else {
            bail!("farmem serve does not run");
        };
        let (server, files) = (running.address.to_string(), self.files.0.display().to_string());
        let text = self.pageload(&["regions", "--server", &server, "--directory", &files])?;
        serde_json::from_str(&text).context("figures of regions")
    }

    /// Bytes a second of one plain TCP stream, from the servers' processor to the client's.
    pub(crate) fn stream(&self, seconds: f64) -> anyhow::Result<f64> {
        let (server, seconds) = (self.sender.address.to_string(), seconds.to_string());
        let text = self.pageload(&["receive", "--server", &server, "--seconds", &seconds])?;
        let figures: Value = serde_json::from_str(&text)?;
        figures["bytes_per_second"].as_f64().context("no bytes_per_second")
    }

    /// Runs `pageload` on its processor; returns what it printed.
    fn pageload(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new("taskset")
            .args(["-c", &self.client_processor.to_string(), &self.pageload])
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("run taskset (package util-linux)")?;
        ensure!(output.status.success(), "pageload failed: {}", output.status);
        String::from_utf8(output.stdout).context("pageload printed no text")
    }
}

/// Starts a server on its processor, and waits until it takes connections. It ends with us,
/// however we end.
fn start(processor: usize, command: impl FnOnce(u16) -> Vec<String>) -> anyhow::Result<Running> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let command = command(address.port());
    let child = Command::new("taskset")
        .args(["-c", &processor.to_string(), "setpriv", "--pdeathsig", "KILL"])
        .args(&command)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("run taskset (package util-linux)")?;
    let mut running = Running { child, address };
    let began = Instant::now();
    while TcpStream::connect(address).is_err() {
        if let Some(status) = running.child.try_wait()? {
            bail!("{} ended at once: {status}", command[0]);
        }
        ensure!(began.elapsed() < PATIENCE, "{} does not answer", command[0]);
        thread::sleep(Duration::from_millis(10));
    }
    Ok(running)
}

fn is_installed(program: &str) -> bool {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders).any(|folder| folder.join(program).is_file())
}
