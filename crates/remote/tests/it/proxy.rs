//! A TCP connection with someone in the middle who can cut it, or hold everything back.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use farmem_transport::Endpoint;

/// Forwards connections to a server.
pub(crate) struct Proxy {
    pub(crate) endpoint: Endpoint,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Ends of all connections, to cut.
    ends: Mutex<Vec<TcpStream>>,
    /// Nothing is forwarded while set.
    holds: AtomicBool,
    /// New connections are closed at once while set.
    refuses: AtomicBool,
    /// Each connection is cut after so many bytes in each direction, 0 for never.
    cut_after: AtomicU64,
    cuts: AtomicU64,
}

impl Proxy {
    pub(crate) fn start(server: &Endpoint) -> Self {
        let Endpoint::Tcp(server) = *server else { panic!("the proxy speaks TCP") };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = Endpoint::Tcp(listener.local_addr().unwrap());
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        // Ends with the process: tests are short.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                shared.connect(&client, server);
            }
        });
        Self { endpoint, state }
    }

    /// Cuts every connection there is.
    pub(crate) fn cut(&self) {
        for end in self.state.ends.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Cuts each new connection after so many bytes.
    pub(crate) fn cut_after(&self, bytes: u64) {
        self.state.cut_after.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn cuts(&self) -> u64 {
        self.state.cuts.load(Ordering::Relaxed)
    }

    pub(crate) fn hold(&self, holds: bool) {
        self.state.holds.store(holds, Ordering::Relaxed);
    }

    pub(crate) fn refuse(&self, refuses: bool) {
        self.state.refuses.store(refuses, Ordering::Relaxed);
    }
}

impl State {
    fn connect(self: &Arc<Self>, client: &TcpStream, server: SocketAddr) {
        if self.refuses.load(Ordering::Relaxed) {
            return;
        }
        let Ok(server) = TcpStream::connect(server) else {
            return;
        };
        let mut ends = self.ends.lock().unwrap();
        for (from, to) in [(client, &server), (&server, client)] {
            ends.push(from.try_clone().unwrap());
            let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            let shared = Arc::clone(self);
            thread::spawn(move || shared.forward(from, to));
        }
    }

    fn forward(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        let mut total = 0;
        while let Ok(bytes) = from.read(&mut buffer) {
            while self.holds.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(1));
            }
            let limit = self.cut_after.load(Ordering::Relaxed);
            let room = if limit == 0 { u64::MAX } else { limit.saturating_sub(total) };
            let passed = bytes.min(usize::try_from(room).unwrap_or(usize::MAX));
            total += passed as u64;
            let broken = to.write_all(&buffer[..passed]).is_err();
            if bytes == 0 || broken || passed < bytes {
                self.cuts.fetch_add(u64::from(passed < bytes), Ordering::Relaxed);
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}
