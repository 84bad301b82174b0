//! As much of HTTP/1.1 as S3 clients and S3 servers need, on blocking sockets.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;

/// Tests send nothing larger.
const BODY_BYTES_MAX: usize = 256 << 20;
const HEADERS_MAX: usize = 200;

/// A request, read whole.
#[derive(Clone, Debug, Default)]
pub(super) struct Request {
    pub method: String,
    /// As sent: path and query, still encoded.
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// A response, held whole.
#[derive(Clone, Debug, Default)]
pub(super) struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// What the answer to a HEAD says of the body that it does not have.
    pub length: Option<u64>,
}

impl Request {
    /// The next request of a connection; `None` once the client has closed it.
    pub fn read(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Self>> {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let mut words = line.split_whitespace();
        let (Some(method), Some(target)) = (words.next(), words.next()) else {
            return Err(io::Error::other(format!("no request line: {line:?}")));
        };
        let mut request = Self {
            method: method.into(),
            target: target.into(),
            headers: read_headers(stream)?,
            ..Self::default()
        };
        if request.header("expect").is_some() {
            stream.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        request.body = read_body(stream, &request.headers, Some(0))?;
        Ok(Some(request))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// Parameters of the query, decoded.
    pub fn query(&self) -> Vec<(String, String)> {
        let query = self.target.split_once('?').map_or("", |(_, query)| query);
        query
            .split('&')
            .filter(|parameter| !parameter.is_empty())
            .map(|parameter| {
                let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
                (decode(&key.replace('+', " ")), decode(&value.replace('+', " ")))
            })
            .collect()
    }

    pub fn parameter(&self, name: &str) -> Option<String> {
        self.query().into_iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// Asks a server on a connection of its own.
    pub fn forward(&self, server: std::net::SocketAddr) -> io::Result<Response> {
        let mut stream = TcpStream::connect(server)?;
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        for (name, value) in &self.headers {
            if !matches!(
                name.to_ascii_lowercase().as_str(),
                "connection" | "expect" | "transfer-encoding" | "content-length"
            ) {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        head.push_str(&format!("content-length: {}\r\nconnection: close\r\n\r\n", self.body.len()));
        stream.write_all(head.as_bytes())?;
        stream.write_all(&self.body)?;
        Response::read(&mut BufReader::new(stream), self.method == "HEAD")
    }
}

impl Response {
    fn read(stream: &mut BufReader<TcpStream>, to_head: bool) -> io::Result<Self> {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let status = line.split_whitespace().nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("no status line: {line:?}")))?;
        let headers = read_headers(stream)?;
        let length = find(&headers, "content-length").and_then(|length| length.parse().ok());
        let bodiless = to_head || matches!(status, 204 | 304);
        let body = if bodiless { Vec::new() } else { read_body(stream, &headers, None)? };
        Ok(Self { status, headers, body, length: length.filter(|_| to_head) })
    }

    /// Sends it, or only the first `body_bytes` of its body.
    pub fn write(&self, stream: &mut TcpStream, body_bytes: usize) -> io::Result<()> {
        let mut head = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        for (name, value) in &self.headers {
            if !matches!(
                name.to_ascii_lowercase().as_str(),
                "connection" | "content-length" | "transfer-encoding"
            ) {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        let length = self.length.unwrap_or(self.body.len() as u64);
        head.push_str(&format!("content-length: {length}\r\n\r\n"));
        stream.write_all(head.as_bytes())?;
        stream.write_all(&self.body[..body_bytes.min(self.body.len())])?;
        stream.flush()
    }
}

fn read_headers(stream: &mut impl BufRead) -> io::Result<Vec<(String, String)>> {
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(headers);
        }
        if headers.len() == HEADERS_MAX {
            return Err(io::Error::other("too many headers"));
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
}

/// Without a length and without chunks: `otherwise` bytes, or all until the end.
fn read_body(
    stream: &mut impl BufRead,
    headers: &[(String, String)],
    otherwise: Option<usize>,
) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    if find(headers, "transfer-encoding").is_some_and(|encoding| encoding.eq_ignore_ascii_case("chunked")) {
        loop {
            let mut line = String::new();
            stream.read_line(&mut line)?;
            let size = line.trim().split(';').next().unwrap_or_default();
            let size = usize::from_str_radix(size, 16).map_err(io::Error::other)?;
            append(stream, &mut body, size)?;
            stream.read_line(&mut line)?;
            if size == 0 {
                return Ok(body);
            }
        }
    }
    let length =
        find(headers, "content-length").map(|length| length.parse().map_err(io::Error::other)).transpose()?;
    match length.or(otherwise) {
        Some(length) => append(stream, &mut body, length)?,
        None => drop(stream.take(BODY_BYTES_MAX as u64).read_to_end(&mut body)?),
    }
    Ok(body)
}

fn append(stream: &mut impl BufRead, body: &mut Vec<u8>, length: usize) -> io::Result<()> {
    let start = body.len();
    if start + length > BODY_BYTES_MAX {
        return Err(io::Error::other("the body is too large"));
    }
    body.resize(start + length, 0);
    stream.read_exact(&mut body[start..])
}

fn find<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(header, _)| header.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

/// Decodes `%xx`; what is not well-formed stays.
pub(super) fn decode(text: &str) -> String {
    crate::open::percent_decode(text).unwrap_or_else(|_| text.to_owned())
}

fn reason(status: u16) -> &'static str {
    match status {
        200..=299 => "OK",
        300..=399 => "Redirect",
        400..=499 => "Client Error",
        _ => "Server Error",
    }
}
