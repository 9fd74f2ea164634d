//! Making another connection after one broke, without waiting: the same server process, the same
//! session, or none.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use farmem_region::{Nanos, Readiness};
use farmem_transport::{Connection, Socket};
use farmem_wire::{Attach, AttachMode};

use crate::config::{RemoteConfig, SessionInfo};
use crate::exchange::{Exchange, ExchangeError};

/// Pause between two attempts.
const ATTEMPT_PAUSE_US: u64 = 20_000;

/// A connection in the making.
#[derive(Debug)]
pub(crate) struct Reconnect {
    /// Why the last connection, or the last attempt, came to nothing.
    reason: String,
    since: Nanos,
    /// Since when nobody listens at the server's address.
    refused_since: Option<Nanos>,
    next_attempt: Nanos,
    attempt: Option<Attempt>,
}

#[derive(Debug)]
struct Attempt {
    exchange: Exchange,
    began: Nanos,
    /// The server's name for the new connection, once it has answered hello.
    connection: Option<u64>,
}

/// How far it got.
#[derive(Debug)]
pub(crate) enum Step {
    Waiting,
    Up { socket: Socket, connection: u64 },
    Lost(String),
}

impl Reconnect {
    pub(crate) const fn new(reason: String, now: Nanos) -> Self {
        Self { reason, since: now, refused_since: None, next_attempt: now, attempt: None }
    }

    /// Goes as far as goes without waiting.
    pub(crate) fn advance(
        &mut self,
        config: &RemoteConfig,
        session: &SessionInfo,
        replaces: u64,
        share_arena: bool,
        now: Nanos,
    ) -> Step {
        let times = &config.timeouts;
        let is_over = |since: Option<Nanos>, limit: u64| {
            since.is_some_and(|since| now.since(since) / 1_000 >= limit)
        };
        if is_over(Some(self.since), times.reconnect_us)
            || is_over(self.refused_since, times.refused_us)
        {
            return Step::Lost(std::mem::take(&mut self.reason));
        }
        if self.attempt.is_none() {
            if now < self.next_attempt {
                return Step::Waiting;
            }
            match Exchange::new(&config.server) {
                Ok(mut exchange) => {
                    exchange.ask_hello(share_arena);
                    self.attempt = Some(Attempt { exchange, began: now, connection: None });
                }
                Err(error) => return self.attempt_failed(&ExchangeError::Io(error), now),
            }
        }
        match self.advance_attempt(session, replaces) {
            Ok(Some(step)) => step,
            Ok(None) => {
                if is_over(self.attempt.as_ref().map(|attempt| attempt.began), times.attempt_us) {
                    return self.attempt_failed(&ExchangeError::TimedOut, now);
                }
                Step::Waiting
            }
            Err(error) => self.attempt_failed(&error, now),
        }
    }

    fn advance_attempt(
        &mut self,
        session: &SessionInfo,
        replaces: u64,
    ) -> Result<Option<Step>, ExchangeError> {
        let Some(attempt) = &mut self.attempt else {
            return Ok(None);
        };
        while let Some(reply) = attempt.exchange.advance()? {
            let Some(connection) = attempt.connection else {
                if reply.header.incarnation != session.incarnation {
                    let reason = "the server has restarted and is empty".to_owned();
                    return Ok(Some(Step::Lost(reason)));
                }
                attempt.connection = Some(attempt.exchange.hello_reply(&reply)?.connection);
                attempt.exchange.ask_attach(session, Attach { mode: AttachMode::Join, replaces });
                continue;
            };
            let socket = self.attempt.take().map(|attempt| attempt.exchange.into_socket());
            return Ok(socket.map(|socket| Step::Up { socket, connection }));
        }
        Ok(None)
    }

    fn attempt_failed(&mut self, error: &ExchangeError, now: Nanos) -> Step {
        self.attempt = None;
        self.next_attempt = now.plus_micros(ATTEMPT_PAUSE_US);
        if let ExchangeError::Refused(code, _) = error
            && code.advice() != farmem_wire::Advice::Retry
        {
            return Step::Lost(code.text().to_owned());
        }
        match error {
            ExchangeError::Io(error) if nobody_listens(error) => {
                self.refused_since.get_or_insert(now);
            }
            _ => self.refused_since = None,
        }
        self.reason = error.to_string();
        Step::Waiting
    }

    /// The descriptor of the connection in the making.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.attempt.as_ref().map(|attempt| attempt.exchange.socket().descriptor())
    }

    /// What to wait for before the next step.
    pub(crate) fn readiness(&self, config: &RemoteConfig) -> Readiness {
        let end = self.since.plus_micros(config.timeouts.reconnect_us);
        match &self.attempt {
            None => Readiness {
                descriptor: None,
                wants_write: false,
                deadline: Some(self.next_attempt.min(end)),
            },
            Some(attempt) => Readiness {
                descriptor: Some(attempt.exchange.socket().descriptor().as_raw_fd()),
                wants_write: attempt.exchange.wants_write(),
                deadline: Some(attempt.began.plus_micros(config.timeouts.attempt_us).min(end)),
            },
        }
    }
}

fn nobody_listens(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}
