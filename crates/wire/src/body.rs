//! Bodies: what the actions carry that are neither pages nor ranges. Fixed fields first, text
//! last; a longer body than expected is fine (a later version may append), a shorter one is not.

use farmem_region::{ByteCount, ExternalAddress, PageCount, RegionId};

/// Bytes of the longest client name, and of the longest credentials.
pub const NAME_BYTES_MAX: usize = 255;

/// Bytes of the longest setup body.
pub const SETUP_BYTES_MAX: usize = 16 + 2 * NAME_BYTES_MAX;

/// Bytes of a hello body.
pub const HELLO_BYTES: usize = 8;

/// Why a body is not what its action carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// Cut short.
    #[error("the body has {found} bytes, {needed} are needed")]
    Short {
        /// Bytes there.
        found: usize,
        /// Bytes needed.
        needed: usize,
    },
    /// Not text.
    #[error("the client's name is not UTF-8")]
    Name,
    /// A number that means nothing.
    #[error("{field} is {value}, which means nothing")]
    Value {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// The first request of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version that the client speaks.
    pub oldest: u16,
    /// Newest version that the client speaks.
    pub newest: u16,
    /// Whether the client, on the same machine, would map the server's arena.
    pub share_arena: bool,
}

/// The answer to hello. The incarnation is in the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HelloReply {
    /// The version of all further messages.
    pub version: u16,
    /// Whether the arena's descriptor rides on this message.
    pub arena_shared: bool,
    /// Whether the server's memory outlives its process: when that has ended, another one may go on
    /// in the same incarnation, and is worth waiting for.
    pub lasts: bool,
    /// Whether a clone may have a range of a file of its own.
    pub clones_have_ranges: bool,
    /// How long a session without a connection lives.
    pub session_timeout_ms: u32,
    /// Names this connection, for a later attach to replace it.
    pub connection: u64,
    /// The actions that the server knows: bit n for action n.
    pub actions: u64,
    /// Slots of the arena, if it is shared.
    pub arena_slots: u64,
}

/// Asks for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup<'a> {
    /// Bytes to reserve.
    pub amount: ByteCount,
    /// Whether less is welcome too.
    pub accept_partial: bool,
    /// Whether the reservation may grow later.
    pub dynamic: bool,
    /// What the client calls itself, for people.
    pub name: &'a str,
    /// Proves who the client is; empty in version 1, not looked at.
    pub credentials: &'a [u8],
}

/// The answer to setup and attach. Session, token, epoch and incarnation are in the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrantedSetup {
    /// Bytes reserved.
    pub granted: ByteCount,
    /// The session's region.
    pub region: RegionId,
    /// Pages of the region.
    pub pages: PageCount,
}

/// How a connection is bound to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachMode {
    /// Beside the session's other connections, in the same epoch.
    Join,
    /// As the only writer from now on: raises the epoch, so all others are refused.
    TakeOver,
}

/// Binds a session to the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attach {
    /// How.
    pub mode: AttachMode,
    /// The connection that this one replaces, 0 for none: requests that may still arrive there
    /// are refused from now on.
    pub replaces: u64,
}

/// Makes the session's region larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malloc {
    /// Pages of the region before, as the client knows: makes a repeated request harmless.
    pub from: PageCount,
    /// Pages to add.
    pub add: PageCount,
}

/// The answer to malloc.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MallocReply {
    /// Where the added pages begin.
    pub address: ExternalAddress,
    /// Pages of the region now.
    pub pages: PageCount,
    /// Bytes reserved now: a dynamic reservation may have grown.
    pub granted: ByteCount,
}

impl Hello {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.oldest.to_le_bytes());
        out.extend_from_slice(&self.newest.to_le_bytes());
        out.extend_from_slice(&u32::from(self.share_arena).to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, HELLO_BYTES)?;
        Ok(Self { oldest: fields.u16(), newest: fields.u16(), share_arena: fields.u32() & 1 != 0 })
    }
}

impl HelloReply {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.version.to_le_bytes());
        let flags = u16::from(self.arena_shared)
            | u16::from(self.lasts) << 1
            | u16::from(self.clones_have_ranges) << 2;
        out.extend_from_slice(&flags.to_le_bytes());
        out.extend_from_slice(&self.session_timeout_ms.to_le_bytes());
        out.extend_from_slice(&self.connection.to_le_bytes());
        out.extend_from_slice(&self.actions.to_le_bytes());
        out.extend_from_slice(&self.arena_slots.to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, 32)?;
        let (version, flags) = (fields.u16(), fields.u16());
        Ok(Self {
            version,
            arena_shared: flags & 1 != 0,
            lasts: flags & 2 != 0,
            clones_have_ranges: flags & 4 != 0,
            session_timeout_ms: fields.u32(),
            connection: fields.u64(),
            actions: fields.u64(),
            arena_slots: fields.u64(),
        })
    }
}

impl<'a> Setup<'a> {
    const ACCEPT_PARTIAL: u32 = 1;
    const DYNAMIC: u32 = 2;

    /// Appends the body's bytes. Name and credentials are cut at [`NAME_BYTES_MAX`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        let name = &self.name.as_bytes()[..self.name.floor_char_boundary(NAME_BYTES_MAX)];
        let credentials = &self.credentials[..self.credentials.len().min(NAME_BYTES_MAX)];
        let partial = if self.accept_partial { Self::ACCEPT_PARTIAL } else { 0 };
        let dynamic = if self.dynamic { Self::DYNAMIC } else { 0 };
        let flags = partial | dynamic;
        out.extend_from_slice(&self.amount.get().to_le_bytes());
        out.extend_from_slice(&flags.to_le_bytes());
        // Both were cut at 255 bytes.
        out.extend_from_slice(&(name.len() as u16).to_le_bytes());
        out.extend_from_slice(&(credentials.len() as u16).to_le_bytes());
        out.extend_from_slice(name);
        out.extend_from_slice(credentials);
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError`] if it is cut short, or a text is too long or no text.
    pub fn decode(body: &'a [u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, 16)?;
        let amount = ByteCount::new(fields.u64());
        let flags = fields.u32();
        let (name, credentials) = (usize::from(fields.u16()), usize::from(fields.u16()));
        if let Some(long) = [name, credentials].into_iter().find(|len| *len > NAME_BYTES_MAX) {
            return Err(BodyError::Value { field: "length of a text", value: long as u64 });
        }
        let needed = 16 + name + credentials;
        let text = body.get(16..needed).ok_or(BodyError::Short { found: body.len(), needed })?;
        let (name, credentials) = text.split_at(name);
        Ok(Self {
            amount,
            accept_partial: flags & Self::ACCEPT_PARTIAL != 0,
            dynamic: flags & Self::DYNAMIC != 0,
            name: str::from_utf8(name).map_err(|_| BodyError::Name)?,
            credentials,
        })
    }
}

impl GrantedSetup {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.granted.get().to_le_bytes());
        out.extend_from_slice(&self.region.get().to_le_bytes());
        out.extend_from_slice(&self.pages.get().to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, 24)?;
        Ok(Self {
            granted: ByteCount::new(fields.u64()),
            region: RegionId::new(fields.u64()),
            pages: PageCount::new(fields.u64()),
        })
    }
}

impl Attach {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mode: u64 = match self.mode {
            AttachMode::Join => 0,
            AttachMode::TakeOver => 1,
        };
        out.extend_from_slice(&mode.to_le_bytes());
        out.extend_from_slice(&self.replaces.to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError`] if it is cut short or the mode unknown.
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, 16)?;
        let mode = match fields.u64() {
            0 => AttachMode::Join,
            1 => AttachMode::TakeOver,
            value => {
                return Err(BodyError::Value { field: "attach mode", value });
            }
        };
        Ok(Self { mode, replaces: fields.u64() })
    }
}

impl Malloc {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.from.get().to_le_bytes());
        out.extend_from_slice(&self.add.get().to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, 16)?;
        Ok(Self { from: PageCount::new(fields.u64()), add: PageCount::new(fields.u64()) })
    }
}

impl MallocReply {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.address.raw().to_le_bytes());
        out.extend_from_slice(&self.pages.get().to_le_bytes());
        out.extend_from_slice(&self.granted.get().to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, 24)?;
        Ok(Self {
            address: ExternalAddress::from_raw(fields.u64()),
            pages: PageCount::new(fields.u64()),
            granted: ByteCount::new(fields.u64()),
        })
    }
}

/// Asks for fresh slots of the arena: as many are added as are missing, and all are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slots {
    /// Slots that the session is to have, at most [`SLOTS_ASSIGNED_MAX`].
    pub wanted: u32,
}

/// Slots that a session may have for its next writes: those of one full message, or of a few
/// messages of a usual run. As many as a body can list.
pub const SLOTS_ASSIGNED_MAX: usize = crate::BODY_BYTES_MAX / 4;

impl Slots {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.wanted.to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        Ok(Self { wanted: Fields::of(body, 4)?.u32() })
    }

    /// Appends a slot to the body of a reply to slots or commit, which is a list of them.
    pub fn encode_assigned(slot: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(&slot.to_le_bytes());
    }

    /// The slots that such a reply lists.
    pub fn decode_assigned(body: &[u8]) -> impl ExactSizeIterator<Item = u32> + '_ {
        body.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes))
    }
}

/// What a refusal with [`crate::RefusalCode::Full`] says: bytes asked for, bytes free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FullBody {
    /// Bytes asked for.
    pub asked: ByteCount,
    /// Bytes that could be granted.
    pub free: ByteCount,
}

impl FullBody {
    /// Appends the body's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.asked.get().to_le_bytes());
        out.extend_from_slice(&self.free.get().to_le_bytes());
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`BodyError::Short`].
    pub fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::of(body, 16)?;
        Ok(Self { asked: ByteCount::new(fields.u64()), free: ByteCount::new(fields.u64()) })
    }
}

/// Takes little-endian numbers off the front of a body whose length has been checked.
pub(crate) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) const fn of(body: &'a [u8], needed: usize) -> Result<Self, BodyError> {
        if body.len() < needed {
            return Err(BodyError::Short { found: body.len(), needed });
        }
        Ok(Self(body))
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the length has been checked");
        self.0 = rest;
        *field
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}
