//! What a supervisor or an operator asks of a server: each call connects, asks once, and ends.

use std::time::{Duration, Instant};

use farmem_region::{Incarnation, StoreError};
use farmem_transport::Endpoint;
use farmem_wire::{Action, Header, RefusalCode, ServerStat, StatCount};

use crate::config::SessionInfo;
use crate::exchange::{Exchange, ExchangeError};

/// How a server is.
///
/// # Errors
/// [`StoreError::Refused`] says why there is no answer.
pub fn stat(server: &Endpoint, timeout: Duration) -> Result<ServerStat, StoreError> {
    stat_with_counts(server, timeout).map(|(stat, _)| stat)
}

/// How a server is, and how many requests of which kind it has answered and refused.
///
/// # Errors
/// [`StoreError::Refused`] says why there is no answer.
pub fn stat_with_counts(
    server: &Endpoint,
    timeout: Duration,
) -> Result<(ServerStat, Vec<StatCount>), StoreError> {
    let ask = || {
        let deadline = Instant::now() + timeout;
        let (mut exchange, ..) = Exchange::open(server, false, deadline)?;
        exchange.ask(Header::request(Action::Stat, 2), |_| ());
        let reply = exchange.wait(deadline)?;
        let body = exchange.bytes(reply.body);
        let stat =
            ServerStat::decode(body).map_err(|error| ExchangeError::BadReply(error.to_string()))?;
        Ok((stat, StatCount::decode_all(body).collect()))
    };
    ask().map_err(|error: ExchangeError| error.into_store_error(server))
}

/// Whether a server answers, and which process it is.
///
/// # Errors
/// [`StoreError::Refused`] says why there is no answer.
pub fn ping(server: &Endpoint, timeout: Duration) -> Result<Incarnation, StoreError> {
    let ask = || {
        let deadline = Instant::now() + timeout;
        let (mut exchange, hello, _) = Exchange::open(server, false, deadline)?;
        exchange.ask(Header::request(Action::Ping, 2), |_| ());
        exchange.wait(deadline).map(|_| hello.incarnation)
    };
    ask().map_err(|error: ExchangeError| error.into_store_error(server))
}

/// Ends a session, which frees all that it holds. Fine if it has ended already, also with its
/// server.
///
/// # Errors
/// [`StoreError::Refused`] if the server cannot be asked, or says that the session is another's.
pub fn disconnect_session(
    server: &Endpoint,
    session: &SessionInfo,
    timeout: Duration,
) -> Result<(), StoreError> {
    let ask = || {
        let deadline = Instant::now() + timeout;
        let (mut exchange, ..) = Exchange::open(server, false, deadline)?;
        exchange.ask(session.header(Action::Disconnect, 2), |_| ());
        exchange.wait(deadline).map(|_| ())
    };
    match ask() {
        Ok(()) => Ok(()),
        Err(ExchangeError::Refused(RefusalCode::NoSession | RefusalCode::WrongIncarnation, _)) => {
            Ok(())
        }
        Err(error) => Err(error.into_store_error(server)),
    }
}
