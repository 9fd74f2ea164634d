//! One small request and its reply on a connection of its own: how connections and sessions are
//! made and ended, and how servers are asked how they are.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use farmem_region::StoreError;
use farmem_transport::{Connection, Endpoint, Moved, Socket};
use farmem_wire::{
    Action, Attach, BODY_BYTES_MAX, DecodeError, FullBody, HEAD_BYTES_MAX, HEADER_BYTES, Header,
    Hello, HelloReply, MapChange, MapReply, PAGE_ENTRY_BYTES, PAYLOAD_BYTES_MAX, Payload,
    ProtocolVersion, RefusalCode, TakenBody, seal, verify_body,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::config::SessionInfo;

/// Why an exchange failed.
#[derive(Debug)]
pub(crate) enum ExchangeError {
    /// The connection could not be made, broke, or closed.
    Io(io::Error),
    /// What came is no reply to what was asked.
    BadReply(String),
    /// The server refused.
    Refused(RefusalCode, Option<FullBody>),
    /// Another region has a range of a file, or a part of it.
    Taken(TakenBody),
    /// A text that a request has no room for. It would be cut, and name something else.
    TooLong { what: &'static str, bytes: usize, bytes_max: usize },
    /// No reply in time.
    TimedOut,
}

impl From<io::Error> for ExchangeError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<DecodeError> for ExchangeError {
    fn from(error: DecodeError) -> Self {
        Self::BadReply(error.to_string())
    }
}

impl std::fmt::Display for ExchangeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::BadReply(what) => write!(f, "it does not speak as a memory server: {what}"),
            Self::Refused(code, _) => f.write_str(code.text()),
            Self::Taken(TakenBody { asked, taken, holder }) => write!(
                f,
                "bytes {} to {} of the file are not to be had: region {holder} has {} to {}; choose an \
                 offset so that the range ends before or begins after that",
                asked.start, asked.end, taken.start, taken.end
            ),
            Self::TooLong { what, bytes, bytes_max } => {
                write!(
                    f,
                    "the {what} has {bytes} bytes, the most is {bytes_max}; choose a shorter one"
                )
            }
            Self::TimedOut => f.write_str("it did not answer in time"),
        }
    }
}

impl ExchangeError {
    /// As the error of a store.
    pub(crate) fn into_store_error(self, server: &Endpoint) -> StoreError {
        let server = server.to_string();
        match self {
            Self::Refused(RefusalCode::Full, Some(full)) => {
                StoreError::Full { server, asked: full.asked.get(), free: full.free.get() }
            }
            other => StoreError::Refused { server, reason: other.to_string() },
        }
    }
}

/// A request on its way out, or its reply on its way in.
#[derive(Debug)]
pub(crate) struct Exchange {
    socket: Socket,
    out: Vec<u8>,
    sent: usize,
    input: Vec<u8>,
    received: usize,
    /// Requests without a reply.
    awaited: Vec<u64>,
    /// Whether what was received is a reply that was handed out.
    is_taken: bool,
    /// Whether a reply may carry pages.
    takes_pages: bool,
    /// A descriptor that came with the reply.
    pub(crate) passed: Option<OwnedFd>,
    /// What has come of a map ahead of replies, oldest first, if it was asked for.
    news: Option<Vec<News>>,
}

/// What others have changed of a region.
#[derive(Debug)]
pub(crate) struct News {
    pub(crate) changes: Vec<MapChange>,
    /// Whether more has changed than that, which nobody tells.
    pub(crate) is_outdated: bool,
}

/// Messages of news that may wait to be looked at: as many as the server sends for one request, which
/// it may look at more than once, and for those that tell a large map.
const NEWS_WAITING_MAX: usize = 4096;

/// A reply, with its body in the exchange.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) header: Header,
    pub(crate) entries: std::ops::Range<usize>,
    /// The body, or the pages.
    pub(crate) body: std::ops::Range<usize>,
}

impl Exchange {
    pub(crate) fn new(server: &Endpoint) -> io::Result<Self> {
        Ok(Self {
            socket: Socket::connect(server)?,
            out: Vec::new(),
            sent: 0,
            input: vec![0; HEADER_BYTES + PAGE_ENTRY_BYTES + BODY_BYTES_MAX],
            received: 0,
            awaited: Vec::new(),
            is_taken: false,
            takes_pages: false,
            passed: None,
            news: None,
        })
    }

    /// The connection, after the last exchange.
    pub(crate) fn into_socket(self) -> Socket {
        self.socket
    }

    pub(crate) const fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Whether the request is not sent yet.
    pub(crate) const fn wants_write(&self) -> bool {
        self.sent < self.out.len()
    }

    pub(crate) fn bytes(&self, range: std::ops::Range<usize>) -> &[u8] {
        &self.input[range]
    }

    /// Begins with a request; `body` appends its body.
    pub(crate) fn ask(&mut self, header: Header, body: impl FnOnce(&mut Vec<u8>)) {
        self.out.clear();
        self.awaited.clear();
        (self.sent, self.received, self.is_taken) = (0, 0, false);
        self.ask_also(header, body);
    }

    /// Asks for something more before the replies to all that was asked are there.
    pub(crate) fn ask_also(&mut self, header: Header, body: impl FnOnce(&mut Vec<u8>)) {
        self.out.drain(..std::mem::take(&mut self.sent));
        let start = self.out.len();
        self.out.resize(start + HEADER_BYTES, 0);
        body(&mut self.out);
        seal(header, &mut self.out[start..]);
        self.awaited.push(header.request);
    }

    /// Makes room for replies that carry pages.
    pub(crate) fn accept_pages(&mut self) {
        self.takes_pages = true;
        self.input.resize(HEAD_BYTES_MAX + PAYLOAD_BYTES_MAX, 0);
    }

    /// Appends the pages of a write to the request that was just begun.
    pub(crate) fn append(&mut self, pages: &[u8]) {
        self.out.extend_from_slice(pages);
    }

    /// Begins with hello.
    pub(crate) fn ask_hello(&mut self, share_arena: bool) {
        let newest = ProtocolVersion::NEWEST.number();
        let hello = Hello { oldest: ProtocolVersion::V1.number(), newest, share_arena };
        self.ask(Header::request(Action::Hello, 1), |out| hello.encode(out));
    }

    /// Begins with attach.
    pub(crate) fn ask_attach(&mut self, session: &SessionInfo, attach: Attach) {
        self.ask(session.header(Action::Attach, 2), |out| attach.encode(out));
    }

    /// Goes as far as goes without waiting; the next reply once it is there.
    pub(crate) fn advance(&mut self) -> Result<Option<Reply>, ExchangeError> {
        while self.sent < self.out.len() {
            match self.socket.send(&[IoSlice::new(&self.out[self.sent..])])? {
                Moved::Bytes(bytes) => self.sent += bytes,
                Moved::WouldBlock => return Ok(None),
                Moved::Closed => return Err(closed()),
            }
        }
        if std::mem::take(&mut self.is_taken) {
            self.received = 0;
        }
        loop {
            let needed = match self.reply()? {
                Ok(reply) if reply.header.news => {
                    self.keep_news(&reply)?;
                    self.received = 0;
                    continue;
                }
                Ok(reply) => {
                    self.is_taken = true;
                    self.awaited.retain(|request| *request != reply.header.request);
                    return Ok(Some(reply));
                }
                Err(needed) => needed,
            };
            let room = &mut self.input[self.received..needed];
            let (moved, passed) = self.socket.receive_with(&mut [IoSliceMut::new(room)])?;
            if passed.is_some() {
                self.passed = passed;
            }
            match moved {
                Moved::Bytes(bytes) => self.received += bytes,
                Moved::WouldBlock => return Ok(None),
                Moved::Closed => return Err(closed()),
            }
        }
    }

    /// Makes room for news of a map.
    pub(crate) fn accept_news(&mut self) {
        let room = HEAD_BYTES_MAX + BODY_BYTES_MAX;
        self.input.resize(self.input.len().max(room), 0);
        self.news.get_or_insert_default();
    }

    /// What has come since it was looked at.
    pub(crate) fn take_news(&mut self) -> Vec<News> {
        self.news.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn keep_news(&mut self, message: &Reply) -> Result<(), ExchangeError> {
        let Some(news) = &mut self.news else {
            return Err(ExchangeError::BadReply("news came that nobody asked for".to_owned()));
        };
        if news.len() == NEWS_WAITING_MAX {
            return Err(ExchangeError::BadReply("nothing but news comes".to_owned()));
        }
        let body = MapReply::decode(&self.input[message.body.clone()])
            .map_err(|error| ExchangeError::BadReply(error.to_string()))?;
        let changes = MapChange::decode_all(&self.input[message.entries.clone()]).collect();
        news.push(News { changes, is_outdated: body.is_outdated });
        Ok(())
    }

    /// The reply if it is complete; else the bytes that are needed to know more.
    fn reply(&self) -> Result<Result<Reply, usize>, ExchangeError> {
        let Some((head, rest)) = self.input[..self.received].split_first_chunk() else {
            return Ok(Err(HEADER_BYTES));
        };
        let header = Header::decode(head)?;
        let fits = self.awaited.contains(&header.request) && header.reply;
        let is_small = (header.payload_kind() == Payload::Body || self.takes_pages)
            && header.message_bytes() <= self.input.len();
        if !fits || !is_small {
            let code = header.refusal.map(|code| ExchangeError::Refused(code, None));
            return Err(code.unwrap_or_else(|| {
                ExchangeError::BadReply(format!("an unexpected {:?} came", header.action))
            }));
        }
        let Some(covered) = rest.get(..header.covered_bytes()) else {
            return Ok(Err(header.message_bytes()));
        };
        let start = HEADER_BYTES + header.entry_bytes();
        let body = start..start + header.payload_bytes();
        if rest.len() < header.message_bytes() - HEADER_BYTES {
            return Ok(Err(header.message_bytes()));
        }
        verify_body(&header, covered)?;
        match header.refusal {
            None => Ok(Ok(Reply { header, entries: HEADER_BYTES..start, body })),
            Some(RefusalCode::RangeTaken) => {
                let taken = TakenBody::decode(&self.input[body])
                    .map_err(|error| ExchangeError::BadReply(error.to_string()))?;
                Err(ExchangeError::Taken(taken))
            }
            Some(code) => {
                let full = FullBody::decode(&self.input[body]).ok();
                Err(ExchangeError::Refused(code, full.filter(|_| code == RefusalCode::Full)))
            }
        }
    }

    /// Waits for the reply.
    pub(crate) fn wait(&mut self, deadline: Instant) -> Result<Reply, ExchangeError> {
        loop {
            if let Some(reply) = self.advance()? {
                return Ok(reply);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ExchangeError::TimedOut);
            }
            self.wait_ready(left)?;
        }
    }

    fn wait_ready(&self, at_most: Duration) -> Result<(), ExchangeError> {
        let interest = if self.wants_write() { PollFlags::OUT } else { PollFlags::IN };
        let descriptor = self.socket.descriptor();
        let timeout = Timespec {
            tv_sec: at_most.as_secs().cast_signed(),
            tv_nsec: at_most.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::from_borrowed_fd(descriptor, interest)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(ExchangeError::Io(errno.into())),
        }
    }

    /// Connects and says hello.
    pub(crate) fn open(
        server: &Endpoint,
        share_arena: bool,
        deadline: Instant,
    ) -> Result<(Self, Header, HelloReply), ExchangeError> {
        let mut exchange = Self::new(server)?;
        exchange.ask_hello(share_arena);
        let reply = exchange.wait(deadline)?;
        let hello = exchange.hello_reply(&reply)?;
        Ok((exchange, reply.header, hello))
    }

    pub(crate) fn hello_reply(&self, reply: &Reply) -> Result<HelloReply, ExchangeError> {
        HelloReply::decode(self.bytes(reply.body.clone()))
            .map_err(|error| ExchangeError::BadReply(error.to_string()))
    }
}

impl SessionInfo {
    /// A request of the session.
    pub(crate) const fn header(&self, action: Action, request: u64) -> Header {
        let mut header = Header::request(action, request);
        header.session = self.session;
        header.region = self.region;
        header.epoch = self.epoch;
        header.incarnation = self.incarnation;
        header.token = self.token;
        header
    }
}

fn closed() -> ExchangeError {
    ExchangeError::Io(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"))
}
