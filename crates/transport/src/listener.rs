//! Where connections come in.

use std::ffi::OsStr;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::{Endpoint, Socket};

/// Connections that the kernel keeps for us until we accept them. A burst of a thousand clients
/// fits.
const BACKLOG: i32 = 1024;

/// A socket that listens. A Unix socket's file goes with it.
#[derive(Debug)]
pub struct Listener {
    descriptor: OwnedFd,
    endpoint: Endpoint,
    /// Whether the file of a Unix socket stays, as another process listens there.
    stays: bool,
}

impl Listener {
    /// Listens. A Unix socket's file at which nobody listens any more is replaced; a new one can
    /// be used by its owner only.
    ///
    /// # Errors
    /// The address is in use, not ours, or not permitted.
    pub fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            Endpoint::Tcp(address) => Self::bind_tcp(*address),
            Endpoint::Unix(path) => Self::bind_unix(path),
        }
    }

    fn bind_tcp(address: SocketAddr) -> io::Result<Self> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let descriptor = stream_socket(family)?;
        sockopt::set_socket_reuseaddr(&descriptor, true)?;
        rustix::net::bind(&descriptor, &address)?;
        rustix::net::listen(&descriptor, BACKLOG)?;
        let bound = SocketAddr::try_from(rustix::net::getsockname(&descriptor)?)?;
        Ok(Self { descriptor, endpoint: Endpoint::Tcp(bound), stays: false })
    }

    fn bind_unix(path: &Path) -> io::Result<Self> {
        let descriptor = stream_socket(AddressFamily::UNIX)?;
        let address = SocketAddrUnix::new(path)?;
        match rustix::net::bind(&descriptor, &address) {
            Err(Errno::ADDRINUSE) if nobody_listens(&address)? => {
                rustix::fs::unlink(path)?;
                rustix::net::bind(&descriptor, &address)?;
            }
            other => other?,
        }
        // Before listen: until then every connection is refused.
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
        rustix::net::listen(&descriptor, BACKLOG)?;
        Ok(Self { descriptor, endpoint: Endpoint::Unix(path.to_owned()), stays: false })
    }

    /// Takes a socket at which another process listens too, for now. Who tries to connect is served
    /// by either of the two.
    ///
    /// # Errors
    /// It does not listen, or has no name.
    pub fn adopt(descriptor: OwnedFd) -> io::Result<Self> {
        let no_listener = || io::Error::from(io::ErrorKind::InvalidInput);
        if !sockopt::socket_acceptconn(&descriptor)? {
            return Err(no_listener());
        }
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        let address = rustix::net::getsockname(&descriptor)?;
        let endpoint = if sockopt::socket_domain(&descriptor)? == AddressFamily::UNIX {
            let address = SocketAddrUnix::try_from(address)?;
            let path = address.path_bytes().ok_or_else(no_listener)?;
            Endpoint::Unix(Path::new(OsStr::from_bytes(path)).to_owned())
        } else {
            Endpoint::Tcp(SocketAddr::try_from(address)?)
        };
        Ok(Self { descriptor, endpoint, stays: true })
    }

    /// From now on the address is this process's alone: a Unix socket's file goes with it.
    pub const fn keep(&mut self) {
        self.stays = false;
    }

    /// Leaves the address to a process that has the socket too.
    pub fn leave(mut self) {
        self.stays = true;
    }

    /// Where it listens; a TCP port of 0 has become the real one.
    #[must_use]
    pub const fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The next connection that waits, or `None`.
    ///
    /// # Errors
    /// No descriptors left, or the like; later calls may succeed.
    pub fn accept(&self) -> io::Result<Option<Socket>> {
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&self.descriptor, flags) {
                Ok(descriptor) => return Socket::adopt(descriptor).map(Some),
                Err(Errno::AGAIN) => return Ok(None),
                // The peer gave up before we accepted it: on to the next.
                Err(Errno::INTR | Errno::CONNABORTED | Errno::PROTO) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// What to give to poll or epoll.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Endpoint::Unix(path) = &self.endpoint
            && !self.stays
        {
            // Nothing can be done if it is gone already.
            let _ = rustix::fs::unlink(path);
        }
    }
}

fn stream_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}

fn nobody_listens(address: &SocketAddrUnix) -> io::Result<bool> {
    let probe = stream_socket(AddressFamily::UNIX)?;
    Ok(rustix::net::connect(&probe, address) == Err(Errno::CONNREFUSED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_two_processes_have_keeps_its_address_until_the_last_one_goes() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("socket");
        let unix = Endpoint::Unix(path.clone());
        let tcp = Endpoint::Tcp("127.0.0.1:0".parse().unwrap());
        for endpoint in [unix, tcp] {
            let first = Listener::bind(&endpoint).unwrap();
            let connected = Socket::connect(first.endpoint()).unwrap();
            let again = || Listener::adopt(first.descriptor.try_clone().unwrap()).unwrap();
            drop(again());
            let mut second = again();
            assert_eq!(second.endpoint(), first.endpoint());
            first.leave();
            second.keep();
            assert!(second.accept().unwrap().is_some(), "who came before is served");
            drop(connected);
            assert!(path.exists() || matches!(endpoint, Endpoint::Tcp(_)));
            drop(second);
            assert!(!path.exists());
        }
        let (pipe, _write) = rustix::pipe::pipe().unwrap();
        assert!(Listener::adopt(pipe).is_err());
    }
}
