//! A memory server on a thread of the test.

use std::thread::JoinHandle;

use farmem_client::{Endpoint, RegionOptions};
use farmem_memserver::{MemServer, ServerConfig, StopHandle};
use farmem_region::ByteCount;

/// A running server; stops when dropped.
pub(crate) struct TestServer {
    endpoint: Endpoint,
    config: ServerConfig,
    /// `None` while it is stopped: a handle keeps the data in use.
    running: Option<(StopHandle, JoinHandle<()>)>,
    _directory: tempfile::TempDir,
}

impl TestServer {
    pub(crate) fn start(mebibytes: u64) -> Self {
        Self::start_with(mebibytes, |_| ())
    }

    pub(crate) fn start_with(mebibytes: u64, change: impl FnOnce(&mut ServerConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::Unix(directory.path().join("server"));
        let mut config = ServerConfig::new(vec![endpoint.clone()], ByteCount::new(mebibytes << 20));
        change(&mut config);
        let running = Some(serve(config.clone()));
        Self { endpoint, config, running, _directory: directory }
    }

    /// Another one in its place, which goes on if it was to keep its data.
    pub(crate) fn restart(&mut self) {
        self.stop();
        self.running = Some(serve(self.config.clone()));
    }

    /// Options for a region of that many MiB with a cache of 1 MiB.
    pub(crate) fn options(&self, mebibytes: u64) -> RegionOptions {
        let mut options = RegionOptions::new(self.endpoint.clone(), mebibytes << 20);
        options.cache_size = 1 << 20;
        options
    }

    pub(crate) fn stop(&mut self) {
        if let Some((handle, thread)) = self.running.take() {
            handle.stop();
            thread.join().unwrap();
        }
    }

    /// Bytes that the server has promised to sessions.
    pub(crate) fn reserved(&self) -> u64 {
        self.stat().reserved_bytes
    }

    pub(crate) fn stat(&self) -> farmem_wire::ServerStat {
        let patience = std::time::Duration::from_secs(5);
        farmem_remote::admin::stat(&self.endpoint, patience).unwrap()
    }
}

fn serve(config: ServerConfig) -> (StopHandle, JoinHandle<()>) {
    let server = MemServer::bind(config).unwrap();
    let stop = server.stop_handle();
    let thread = std::thread::spawn(move || {
        server.run().unwrap();
    });
    (stop, thread)
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Runs a test again in a process of its own, where this says so: limits are a process's.
pub(crate) fn alone(test: &str) -> bool {
    const ALONE: &str = "FARMEM_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let output = command.args([test, "--exact", "--nocapture"]).env(ALONE, "1").output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
    false
}

/// Numbers that follow from a seed.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) as usize % bound
    }
}
