//! A client that sends what a test says, byte by byte if need be.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farmem_memserver::{Ended, Handed, LogSink, MemServer, ServerConfig, ServerError, StopHandle};
use farmem_region::{
    ByteCount, Checksum, PAGE_SIZE, PageCount, PageIndex, PageRange, RegionId, Version,
};
use farmem_transport::{Endpoint, Passage};
use farmem_wire::{
    Action, Attach, AttachMode, GrantedSetup, HEADER_BYTES, Header, Hello, HelloReply, Malloc,
    PageEntry, RangeEntry, RefusalCode, ServerStat, Setup, page_checksum, seal,
};

/// A running server; stops when dropped.
pub(crate) struct TestServer {
    pub(crate) path: std::path::PathBuf,
    /// If it is a process of its own.
    pub(crate) process: Option<Mutex<Process>>,
    /// If it is not.
    running: Mutex<Option<Running>>,
    /// Whether it is to hand over again and again.
    pub(crate) hands_over: bool,
    log: Arc<Mutex<Vec<String>>>,
    pub(crate) metrics: Option<SocketAddr>,
    _directory: tempfile::TempDir,
}

/// A server on threads of this process.
struct Running {
    stop: StopHandle,
    thread: JoinHandle<Ended>,
    config: ServerConfig,
}

impl Running {
    fn new(server: MemServer, config: ServerConfig) -> Self {
        let stop = server.stop_handle();
        Self { stop, thread: std::thread::spawn(move || server.run().unwrap()), config }
    }
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").finish_non_exhaustive()
    }
}

impl TestServer {
    pub(crate) fn start(pages: u64, change: impl FnOnce(&mut ServerConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("server");
        let memory = ByteCount::new(pages * PAGE_SIZE as u64);
        let mut config = ServerConfig::new(vec![Endpoint::Unix(path.clone())], memory);
        let log: Arc<Mutex<Vec<String>>> = Arc::default();
        let lines = Arc::clone(&log);
        config.log = LogSink::new(move |line| lines.lock().unwrap().push(line.message.clone()));
        change(&mut config);
        let server = MemServer::bind(config.clone()).unwrap();
        let metrics = server.metrics_address();
        let running = Mutex::new(Some(Running::new(server, config)));
        let (process, hands_over) = (None, false);
        Self { path, process, running, hands_over, log, metrics, _directory: directory }
    }

    /// Has another server go on, in this process.
    pub(crate) fn hand_over(&self) {
        self.try_hand_over(|_| ()).unwrap();
    }

    /// As [`TestServer::hand_over`], with a configuration that is changed; if that is refused, this
    /// server goes on.
    pub(crate) fn try_hand_over(
        &self,
        change: impl FnOnce(&mut ServerConfig),
    ) -> Result<(), ServerError> {
        let mut running = self.running.lock().unwrap();
        let former = running.take().unwrap();
        let mut config = former.config.clone();
        change(&mut config);
        let (ours, theirs) = Passage::pair().unwrap();
        let stop = former.stop.clone();
        let asked = std::thread::spawn(move || stop.hand_over(ours));
        let taken = Handed::receive(theirs)
            .map_err(ServerError::from)
            .and_then(|handed| MemServer::take_over(config.clone(), handed));
        let asked = asked.join().unwrap();
        match taken {
            Ok(server) => {
                asked.unwrap();
                assert_eq!(former.thread.join().unwrap(), Ended::HandedOver);
                *running = Some(Running::new(server, config));
                Ok(())
            }
            Err(error) => {
                *running = Some(former);
                Err(error)
            }
        }
    }

    /// What tells the server to stop, or to hand over.
    pub(crate) fn handle(&self) -> StopHandle {
        self.running.lock().unwrap().as_ref().unwrap().stop.clone()
    }

    /// A server in a process of its own, which can be killed.
    pub(crate) fn spawn(start: impl Fn(&std::path::Path) -> Command + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("server");
        let process = Process::spawn(start, path.clone());
        Self {
            path,
            process: Some(Mutex::new(process)),
            running: Mutex::new(None),
            hands_over: false,
            log: Arc::default(),
            metrics: None,
            _directory: directory,
        }
    }

    /// Kills the process and starts another one in its place.
    pub(crate) fn restart(&self) {
        let mut process = self.process.as_ref().unwrap().lock().unwrap();
        process.kill();
        process.start_again();
    }

    pub(crate) fn stat(&self) -> ServerStat {
        let mut client = Raw::greeted(self);
        let (_, body) = client.call(Header::request(Action::Stat, 0), |_| ());
        ServerStat::decode(&body).unwrap()
    }

    /// Waits until the server is as `is_so` says, at most 10 seconds.
    pub(crate) fn wait_until(&self, is_so: impl Fn(&ServerStat) -> bool) -> ServerStat {
        let began = Instant::now();
        loop {
            let stat = self.stat();
            if is_so(&stat) {
                return stat;
            }
            assert!(began.elapsed() < Duration::from_secs(10), "still {stat:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn wait_until_empty(&self) {
        self.wait_until_empty_but(0);
    }

    /// Waits until a client can connect again.
    pub(crate) fn wait_until_served(&self) -> ServerStat {
        let began = Instant::now();
        loop {
            let mut client = Self::try_connect(self);
            let hello = Hello { oldest: 1, newest: 1, share_arena: false };
            let mut message = vec![0; HEADER_BYTES];
            hello.encode(&mut message);
            seal(Header::request(Action::Hello, 1), &mut message);
            let mut byte = [0];
            if client.write_all(&message).is_ok() && client.read_exact(&mut byte).is_ok() {
                drop(client);
                return self.stat();
            }
            assert!(began.elapsed() < Duration::from_secs(10), "it serves nobody");
        }
    }

    fn try_connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// Waits until nothing is left but that many connections.
    pub(crate) fn wait_until_empty_but(&self, connections: u64) {
        self.wait_until(|stat| {
            // One more connection asks.
            stat.connections == 1 + connections
                && stat.sessions == 0
                && stat.slots == 0
                && stat.pages == 0
                && stat.reserved_bytes == 0
        });
    }

    /// Whether a log line that contains `text` comes, within 5 seconds.
    pub(crate) fn logs(&self, text: &str) -> bool {
        self.logs_all(&[text])
    }

    /// Whether a log line that contains all of `texts` comes, within 5 seconds.
    pub(crate) fn logs_all(&self, texts: &[impl AsRef<str>]) -> bool {
        let is_it = |line: &String| texts.iter().all(|text| line.contains(text.as_ref()));
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(5) {
            if self.log.lock().unwrap().iter().any(is_it) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    pub(crate) fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            process.into_inner().unwrap().kill();
        }
        if let Some(Running { stop, thread, .. }) = self.running.get_mut().unwrap().take() {
            stop.stop();
            assert_eq!(thread.join().unwrap(), Ended::Stopped);
        }
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A server that runs in a process.
pub(crate) struct Process {
    start: Box<dyn Fn(&std::path::Path) -> Command + Send>,
    path: std::path::PathBuf,
    child: Child,
}

impl Process {
    fn spawn(
        start: impl Fn(&std::path::Path) -> Command + Send + 'static,
        path: std::path::PathBuf,
    ) -> Self {
        let child = start(&path).spawn().unwrap();
        let process = Self { start: Box::new(start), path, child };
        process.wait();
        process
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    pub(crate) fn start_again(&mut self) {
        self.child = (self.start)(&self.path).spawn().unwrap();
        self.wait();
    }

    fn wait(&self) {
        let began = Instant::now();
        while UnixStream::connect(&self.path).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "it does not start");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process").field("child", &self.child).finish_non_exhaustive()
    }
}

/// A connection, and the header that its session's requests start from.
pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    pub(crate) session: Header,
    pub(crate) connection: u64,
    next: u64,
}

impl Raw {
    /// Connects and says nothing.
    pub(crate) fn silent(server: &TestServer) -> Self {
        let stream = UnixStream::connect(&server.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self { stream, session: Header::request(Action::Ping, 0), connection: 0, next: 0 }
    }

    /// Connects and says hello.
    pub(crate) fn greeted(server: &TestServer) -> Self {
        let mut client = Self::silent(server);
        let hello = Hello { oldest: 1, newest: 1, share_arena: false };
        let (header, body) =
            client.call(Header::request(Action::Hello, 0), |out| hello.encode(out));
        client.session.incarnation = header.incarnation;
        client.connection = HelloReply::decode(&body).unwrap().connection;
        client
    }

    /// Connects and sets up a session with a region of that many pages.
    pub(crate) fn with_region(server: &TestServer, pages: u64) -> Self {
        let mut client = Self::greeted(server);
        client.setup(pages, false, false).unwrap();
        client.malloc(0, pages).unwrap();
        client
    }

    pub(crate) fn setup(
        &mut self,
        pages: u64,
        accept_partial: bool,
        dynamic: bool,
    ) -> Result<GrantedSetup, RefusalCode> {
        let header = Header::request(Action::Setup, 0);
        self.setup_as(header, pages, accept_partial, dynamic)
    }

    /// As [`Self::setup`]; the header may name the session to begin as a copy of.
    pub(crate) fn setup_as(
        &mut self,
        header: Header,
        pages: u64,
        accept_partial: bool,
        dynamic: bool,
    ) -> Result<GrantedSetup, RefusalCode> {
        let amount = ByteCount::new(pages * PAGE_SIZE as u64);
        let setup = Setup { amount, accept_partial, dynamic, name: "raw", credentials: &[] };
        let (header, body) = self.call(header, |out| setup.encode(out));
        match header.refusal {
            Some(code) => Err(code),
            None => {
                self.session = header;
                Ok(GrantedSetup::decode(&body).unwrap())
            }
        }
    }

    /// Another connection to the same session.
    pub(crate) fn attach(
        &self,
        server: &TestServer,
        mode: AttachMode,
        replaces: u64,
    ) -> Result<Self, RefusalCode> {
        let mut other = Self::greeted(server);
        other.session = self.session;
        let attach = Attach { mode, replaces };
        let (header, _) = other.call(self.request(Action::Attach), |out| attach.encode(out));
        match header.refusal {
            Some(code) => Err(code),
            None => {
                other.session = header;
                Ok(other)
            }
        }
    }

    pub(crate) fn malloc(&mut self, from: u64, add: u64) -> Result<Vec<u8>, RefusalCode> {
        let malloc = Malloc { from: PageCount::new(from), add: PageCount::new(add) };
        let (header, body) = self.call(self.request(Action::Malloc), |out| malloc.encode(out));
        header.refusal.map_or(Ok(body), Err)
    }

    /// The header of a request of the session.
    pub(crate) fn request(&self, action: Action) -> Header {
        Header {
            session: self.session.session,
            region: self.session.region,
            epoch: self.session.epoch,
            incarnation: self.session.incarnation,
            token: self.session.token,
            ..Header::request(action, 0)
        }
    }

    pub(crate) fn write(&mut self, pages: &[(u64, u64, u8)]) -> Result<(), RefusalCode> {
        let message = self.write_message(pages);
        self.stream.write_all(&message).unwrap();
        self.receive().0.refusal.map_or(Ok(()), Err)
    }

    /// A write of pages, each filled with a byte: (page, version, byte).
    pub(crate) fn write_message(&mut self, pages: &[(u64, u64, u8)]) -> Vec<u8> {
        let mut header = self.request(Action::Write);
        header.request = self.next_request();
        header.entries = pages.len() as u32;
        header.payload = (pages.len() * PAGE_SIZE) as u32;
        let mut message = vec![0; HEADER_BYTES];
        for (page, version, byte) in pages {
            entry(header.region, *page, *version, *byte).encode(&mut message);
        }
        seal(header, &mut message);
        for (_, _, byte) in pages {
            message.extend_from_slice(&[*byte; PAGE_SIZE]);
        }
        message
    }

    /// The bytes that fill each page.
    pub(crate) fn read(&mut self, pages: &[(u64, u64)]) -> Result<Vec<u8>, RefusalCode> {
        let mut header = self.request(Action::Read);
        header.entries = pages.len() as u32;
        let (reply, payload) = self.call(header, |out| {
            for (page, version) in pages {
                let (page, version) = (PageIndex::new(*page), Version::new(*version));
                PageEntry { page, version, ..PageEntry::default() }.encode(out);
            }
        });
        if let Some(code) = reply.refusal {
            return Err(code);
        }
        assert_eq!(payload.len(), pages.len() * PAGE_SIZE);
        let content = payload.chunks(PAGE_SIZE);
        Ok(content
            .map(|page| {
                assert!(page.iter().all(|byte| *byte == page[0]), "a torn page");
                page[0]
            })
            .collect())
    }

    pub(crate) fn free(&mut self, start: u64, count: u64) -> Result<(), RefusalCode> {
        let (start, count) = (PageIndex::new(start), PageCount::new(count));
        let header = Header { entries: 1, ..self.request(Action::Free) };
        let entry = RangeEntry(PageRange { start, count });
        let (reply, _) = self.call(header, |out| entry.encode(out));
        reply.refusal.map_or(Ok(()), Err)
    }

    /// A free without ranges.
    pub(crate) fn free_nothing(&mut self) -> Result<(), RefusalCode> {
        let (reply, _) = self.call(self.request(Action::Free), |_| ());
        reply.refusal.map_or(Ok(()), Err)
    }

    /// Sends a request without pages and returns the reply with its body or pages.
    pub(crate) fn call(
        &mut self,
        mut header: Header,
        rest: impl FnOnce(&mut Vec<u8>),
    ) -> (Header, Vec<u8>) {
        header.request = self.next_request();
        let mut message = vec![0; HEADER_BYTES];
        rest(&mut message);
        seal(header, &mut message);
        self.stream.write_all(&message).unwrap();
        let (reply, rest) = self.receive();
        assert_eq!((reply.request, reply.action), (header.request, header.action));
        (reply, rest)
    }

    /// As [`Raw::call`], with the entries of the reply.
    pub(crate) fn call_all(
        &mut self,
        mut header: Header,
        rest: impl FnOnce(&mut Vec<u8>),
    ) -> (Header, Vec<u8>, Vec<u8>) {
        header.request = self.next_request();
        let mut message = vec![0; HEADER_BYTES];
        rest(&mut message);
        seal(header, &mut message);
        self.stream.write_all(&message).unwrap();
        self.receive_all()
    }

    fn next_request(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The next reply with its first entry, if it has any, and its body or pages.
    pub(crate) fn receive_entry(&mut self) -> (Header, PageEntry, Vec<u8>) {
        let (header, entries, rest) = self.receive_all();
        (header, PageEntry::decode_all(&entries).next().unwrap_or_default(), rest)
    }

    /// The next reply: header, and body or pages.
    pub(crate) fn receive(&mut self) -> (Header, Vec<u8>) {
        let (header, _, rest) = self.receive_all();
        (header, rest)
    }

    pub(crate) fn receive_all(&mut self) -> (Header, Vec<u8>, Vec<u8>) {
        let mut head = [0; HEADER_BYTES];
        self.stream.read_exact(&mut head).unwrap();
        let header = Header::decode(&head).unwrap();
        assert!(header.reply);
        let mut rest = vec![0; header.message_bytes() - HEADER_BYTES];
        self.stream.read_exact(&mut rest).unwrap();
        farmem_wire::verify_body(&header, &rest[..header.covered_bytes()]).unwrap();
        let payload = rest.split_off(header.entry_bytes());
        (header, rest, payload)
    }

    /// Whether the server has closed the connection; what it still says is skipped.
    pub(crate) fn is_dropped(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

/// Repeats what is refused as busy, as clients do.
pub(crate) fn patiently<T>(
    mut attempt: impl FnMut() -> Result<T, RefusalCode>,
) -> Result<T, RefusalCode> {
    let began = Instant::now();
    loop {
        match attempt() {
            Err(RefusalCode::Busy) if began.elapsed() < Duration::from_secs(20) => {}
            result => return result,
        }
    }
}

fn entry(region: RegionId, page: u64, version: u64, byte: u8) -> PageEntry {
    let (page, version) = (PageIndex::new(page), Version::new(version));
    let checksum: Checksum = page_checksum(region, page, version, &[byte; PAGE_SIZE]);
    PageEntry { page, version, checksum, slot: 0 }
}
