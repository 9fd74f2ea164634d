//! Where a memory server is: as the user names it, and as the kernel does.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

/// A server as the user names it: `host:port` or `unix:PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ServerAddress {
    /// Host name or number, and port.
    Tcp(String),
    /// Path of a Unix socket.
    Unix(PathBuf),
}

/// A server as the kernel names it. Made by [`ServerAddress::resolve`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// Number and port.
    Tcp(SocketAddr),
    /// Path of a Unix socket.
    Unix(PathBuf),
}

/// Why text is no [`ServerAddress`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address of a memory server; give HOST:PORT or unix:PATH")]
pub struct AddressError(String);

impl ServerAddress {
    /// Finds the number behind a host name, by the system's resolver: it may take seconds, read
    /// files and allocate, so only the binary calls it, before a program is started.
    ///
    /// # Errors
    /// Whatever the resolver says.
    pub fn resolve(&self) -> io::Result<Endpoint> {
        match self {
            Self::Tcp(host_port) => {
                let first = host_port.to_socket_addrs()?.next();
                first.map(Endpoint::Tcp).ok_or_else(|| {
                    io::Error::new(io::ErrorKind::NotFound, format!("{host_port} has no address"))
                })
            }
            Self::Unix(path) => Ok(Endpoint::Unix(path.clone())),
        }
    }
}

impl FromStr for ServerAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(wrong()) } else { Ok(Self::Unix(path.into())) };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(wrong());
        }
        Ok(Self::Tcp(text.to_owned()))
    }
}

/// Takes only what [`ServerAddress::resolve`] gives: a number and port, or a path. No name is
/// looked up.
impl FromStr for Endpoint {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match ServerAddress::from_str(text)? {
            ServerAddress::Unix(path) => Ok(Self::Unix(path)),
            ServerAddress::Tcp(number) => {
                number.parse().map(Self::Tcp).map_err(|_| AddressError(text.to_owned()))
            }
        }
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host_port) => f.write_str(host_port),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl From<Endpoint> for ServerAddress {
    fn from(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Tcp(address) => Self::Tcp(address.to_string()),
            Endpoint::Unix(path) => Self::Unix(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_user_may_write() {
        for text in ["localhost:7070", "10.0.0.1:1", "[::1]:7070", "unix:/run/farmem.sock"] {
            assert_eq!(text.parse::<ServerAddress>().unwrap().to_string(), text);
        }
        for text in ["", "localhost", ":7070", "host:", "host:99999", "unix:"] {
            assert!(text.parse::<ServerAddress>().is_err(), "{text}");
        }
    }
}
