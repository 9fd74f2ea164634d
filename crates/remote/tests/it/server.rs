//! A memory server on a thread of the test.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farmem_memserver::{LogSink, MemServer, ServerConfig, StopHandle};
use farmem_region::ByteCount;
use farmem_remote::admin;
use farmem_transport::Endpoint;
use farmem_wire::ServerStat;

/// A running server; stops when dropped.
pub(crate) struct TestServer {
    pub(crate) endpoint: Endpoint,
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
    _directory: Option<tempfile::TempDir>,
}

/// Over what to reach it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Over {
    Tcp,
    Unix,
}

pub(crate) const BOTH: [Over; 2] = [Over::Tcp, Over::Unix];

impl TestServer {
    pub(crate) fn start(
        over: Over,
        mebibytes: u64,
        change: impl FnOnce(&mut ServerConfig),
    ) -> Self {
        let (endpoint, directory) = match over {
            Over::Tcp => (Endpoint::Tcp("127.0.0.1:0".parse().unwrap()), None),
            Over::Unix => {
                let directory = tempfile::tempdir().unwrap();
                (Endpoint::Unix(directory.path().join("server")), Some(directory))
            }
        };
        let mut server = Self::start_at(endpoint, mebibytes, change);
        server._directory = directory;
        server
    }

    pub(crate) fn start_at(
        endpoint: Endpoint,
        mebibytes: u64,
        change: impl FnOnce(&mut ServerConfig),
    ) -> Self {
        let mut config = ServerConfig::new(vec![endpoint], ByteCount::new(mebibytes << 20));
        config.log = LogSink::new(|line| eprintln!("server: {}", line.message));
        config.workers = 2;
        change(&mut config);
        let server = MemServer::bind(config).unwrap();
        let endpoint = server.endpoints().next().unwrap().clone();
        let stop = server.stop_handle();
        let thread = std::thread::spawn(move || {
            server.run().unwrap();
        });
        Self { endpoint, stop, thread: Some(thread), _directory: None }
    }

    pub(crate) fn stat(&self) -> ServerStat {
        admin::stat(&self.endpoint, Duration::from_secs(5)).unwrap()
    }

    /// Waits until the server is as `is_so` says, at most 15 seconds.
    pub(crate) fn wait_until(&self, is_so: impl Fn(&ServerStat) -> bool) -> ServerStat {
        let began = Instant::now();
        loop {
            let stat = self.stat();
            if is_so(&stat) {
                return stat;
            }
            assert!(began.elapsed() < Duration::from_secs(15), "still {stat:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until nothing is left of any client.
    pub(crate) fn wait_until_empty(&self) {
        self.wait_until(|stat| {
            let ServerStat { reserved_bytes, sessions, connections, pages, slots, .. } = *stat;
            // The one connection asks.
            (reserved_bytes, sessions, connections, pages, slots) == (0, 0, 1, 0, 0)
        });
    }

    pub(crate) fn stop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.stop();
    }
}
