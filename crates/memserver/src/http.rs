//! A port on which a person, or Prometheus, asks how the server is: HTTP/1.1, GET and HEAD, one
//! request a connection.
//!
//! ```text
//!  [ Head ] --- blank line, or something wrong ---> [ Answer ] --- all sent ---> [ Close ]
//!  what comes is kept, up to                        sent as far as goes          what still comes
//!  HEAD_BYTES_MAX                                                                is skipped
//! ```
//!
//! One thread with its own few connections: whatever is sent here, the workers do not notice.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::metrics;

/// Connections at one time; more wait in the kernel until one of these is done.
const CONNECTIONS_MAX: usize = 16;
/// Bytes of a request's head. Those of a browser with cookies of other sites on this host fit.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// The listener rests this long when the kernel has no descriptor left.
const REST: Duration = Duration::from_millis(100);

/// The port.
#[derive(Debug)]
pub(crate) struct HttpPort {
    listener: TcpListener,
    address: SocketAddr,
    /// How long a connection lives.
    timeout: Duration,
}

impl HttpPort {
    pub(crate) fn bind(address: SocketAddr, timeout: Duration) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address, timeout })
    }

    /// Takes over the socket of another process.
    pub(crate) fn adopt(listener: OwnedFd, timeout: Duration) -> io::Result<Self> {
        let listener = TcpListener::from(listener);
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address, timeout })
    }

    /// The socket that listens, for another process.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Where it listens; a port of 0 has become the real one.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `stop` is readable. `metrics` makes the text that is asked for.
    pub(crate) fn serve(
        &self,
        stop: BorrowedFd<'_>,
        metrics: impl Fn() -> String,
    ) -> io::Result<()> {
        let mut visitors: Vec<Visitor> = Vec::new();
        let mut rests_until = None;
        loop {
            let now = Instant::now();
            rests_until = rests_until.filter(|until| *until > now);
            let accepts = visitors.len() < CONNECTIONS_MAX && rests_until.is_none();
            let deadlines = visitors.iter().map(|visitor| visitor.deadline).chain(rests_until);
            let wait = deadlines.min().map(|deadline| timespec(deadline - now.min(deadline)));
            let listening = if accepts { PollFlags::IN } else { PollFlags::empty() };
            let mut watched = vec![
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::from_borrowed_fd(self.listener.as_fd(), listening),
            ];
            watched.extend(visitors.iter().map(Visitor::watched));
            match poll(&mut watched, wait.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let ready: Vec<bool> = watched.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                return Ok(());
            }
            let now = Instant::now();
            let mut ready_visitors = ready[2..].iter();
            visitors.retain_mut(|visitor| {
                let is_ready = ready_visitors.next().is_some_and(|ready| *ready);
                visitor.deadline > now && (!is_ready || visitor.go_on(&metrics))
            });
            if ready[1] && self.accept(&mut visitors).is_err() {
                rests_until = Some(now + REST);
            }
        }
    }

    fn accept(&self, visitors: &mut Vec<Visitor>) -> io::Result<()> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                let deadline = Instant::now() + self.timeout;
                visitors.push(Visitor { stream, deadline, stage: Stage::Head(Vec::new()) });
                Ok(())
            }
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {
                    Ok(())
                }
                _ => Err(error),
            },
        }
    }
}

fn timespec(time: Duration) -> Timespec {
    // Rounded up, or a deadline that is near would be waited for by asking again and again.
    let time = time + Duration::from_millis(1);
    Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() }
}

/// One connection.
#[derive(Debug)]
struct Visitor {
    stream: TcpStream,
    deadline: Instant,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// What has come of the request.
    Head(Vec<u8>),
    /// The answer, and how much of it has been sent.
    Answer { bytes: Vec<u8>, sent: usize },
    /// All is said. Until the visitor has closed its side what it sends is read, since closing
    /// over unread bytes would destroy the answer on its way.
    Close,
}

impl Visitor {
    fn watched(&self) -> PollFd<'_> {
        let flags = match self.stage {
            Stage::Head(_) | Stage::Close => PollFlags::IN,
            Stage::Answer { .. } => PollFlags::OUT,
        };
        PollFd::new(&self.stream, flags)
    }

    /// Goes as far as goes without waiting; returns whether there is more to come.
    fn go_on(&mut self, metrics: &impl Fn() -> String) -> bool {
        loop {
            let step = match &mut self.stage {
                Stage::Head(head) => match receive(&mut self.stream, head) {
                    Ok(true) => answer(head, metrics).map(|bytes| Stage::Answer { bytes, sent: 0 }),
                    Ok(false) => return false,
                    Err(error) => return goes_on_after(&error),
                },
                Stage::Answer { bytes, sent } => match self.stream.write(&bytes[*sent..]) {
                    Ok(count) => {
                        *sent += count;
                        let is_all = *sent == bytes.len();
                        (is_all && self.stream.shutdown(Shutdown::Write).is_ok())
                            .then_some(Stage::Close)
                    }
                    Err(error) => return goes_on_after(&error),
                },
                Stage::Close => match self.stream.read(&mut [0; 4096]) {
                    Ok(0) => return false,
                    Ok(_) => None,
                    Err(error) => return goes_on_after(&error),
                },
            };
            if let Some(stage) = step {
                self.stage = stage;
            }
        }
    }
}

/// Whether a connection on which a call failed may work later.
fn goes_on_after(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Receives more of a head; returns false if no more comes.
fn receive(stream: &mut TcpStream, head: &mut Vec<u8>) -> io::Result<bool> {
    let mut bytes = [0; 2048];
    let count = stream.read(&mut bytes)?;
    head.extend_from_slice(&bytes[..count]);
    Ok(count > 0)
}

/// The answer to a request, or `None` while its head is not complete. A body, which no request of
/// ours has, is not looked at.
pub(crate) fn answer(head: &[u8], metrics: &impl Fn() -> String) -> Option<Vec<u8>> {
    let is_complete = head.windows(4).any(|end| end == b"\r\n\r\n");
    if !is_complete {
        let is_too_long = head.len() > HEAD_BYTES_MAX;
        let text = "the request's head is too long\n".to_owned();
        return is_too_long
            .then(|| reply("431 Request Header Fields Too Large", PLAIN, &text, true));
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let [method, target, version] = words[..] else {
        return Some(reply("400 Bad Request", PLAIN, "this is no HTTP request\n", true));
    };
    if !version.starts_with(b"HTTP/") || target.is_empty() {
        return Some(reply("400 Bad Request", PLAIN, "this is no HTTP request\n", true));
    }
    if !version.starts_with(b"HTTP/1.") {
        let text = "only HTTP/1.0 and 1.1 are spoken here\n";
        return Some(reply("505 HTTP Version Not Supported", PLAIN, text, true));
    }
    let with_body = match method {
        b"GET" => true,
        b"HEAD" => false,
        _ => {
            let status = "405 Method Not Allowed\r\nAllow: GET, HEAD";
            return Some(reply(status, PLAIN, "only GET and HEAD are answered here\n", true));
        }
    };
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    Some(match path {
        b"/metrics" => reply("200 OK", metrics::CONTENT_TYPE, &metrics(), with_body),
        b"/livez" => reply("200 OK", PLAIN, "ok\n", with_body),
        _ => reply("404 Not Found", PLAIN, "there are /metrics and /livez\n", with_body),
    })
}

const PLAIN: &str = "text/plain; charset=utf-8";

fn reply(status: &str, content_type: &str, body: &str, with_body: bool) -> Vec<u8> {
    let length = body.len();
    let body = if with_body { body } else { "" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(request: &str) -> Option<String> {
        let answer = answer(request.as_bytes(), &|| "figures\n".to_owned())?;
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let length = format!("Content-Length: {}\r\n", body.len());
        assert!(request.starts_with("HEAD ") || head.contains(&length), "{answer}");
        Some(head[9..12].to_owned())
    }

    #[test]
    fn requests_get_the_status_that_they_deserve() {
        let long = format!("GET / HTTP/1.1\r\nCookie: {}", "x".repeat(HEAD_BYTES_MAX));
        let long_and_complete = format!("{long}\r\n\r\n");
        for (request, expected) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", Some("200")),
            ("GET /metrics?x=1 HTTP/1.0\r\n\r\n", Some("200")),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", Some("200")),
            ("GET /livez HTTP/1.1\r\n\r\n", Some("200")),
            ("GET / HTTP/1.1\r\n\r\n", Some("404")),
            ("GET /metrics/../livez HTTP/1.1\r\n\r\n", Some("404")),
            ("POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", Some("405")),
            ("get /metrics HTTP/1.1\r\n\r\n", Some("405")),
            ("GET /metrics HTTP/2.0\r\n\r\n", Some("505")),
            ("GET /metrics\r\n\r\n", Some("400")),
            ("GET  /metrics HTTP/1.1\r\n\r\n", Some("400")),
            ("GET /metrics MSMP/1\r\n\r\n", Some("400")),
            ("\r\n\r\n", Some("400")),
            ("\0\u{7f}\r\n\r\n", Some("400")),
            ("GET /metrics HTTP/1.1\r\n", None),
            ("GET /metrics HTTP/1.1\n\n", None),
            ("", None),
            (&long, Some("431")),
            (&long_and_complete, Some("404")),
        ] {
            assert_eq!(status(request).as_deref(), expected, "{request:.60}");
        }
    }
}
