//! HTTP and TLS for `object_store`: hyper and rustls, with the cryptography of graviola, because the usual providers are
//! partly under Apache-2.0 alone (`docs/decisions/0001-s3-client.md`).

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use http_body_util::{BodyExt, Limited};
use hyper::body::Body;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector as TcpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
    HttpResponseBody, HttpService,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use super::failure::{self, Seen};

const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Stores close idle connections after 20 s or more; a connection closed under a request costs a try.
const IDLE_CONNECTION_MAX: Duration = Duration::from_secs(10);
/// An error's body is a page of XML.
const ERROR_BODY_BYTES_MAX: usize = 64 << 10;

/// Where instances, containers and pods ask for their role.
const ROLE_SERVICES: [&str; 3] = ["169.254.169.254", "169.254.170.2", "169.254.170.23"];

/// A client with a pool of connections; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Http {
    client: Client<HttpsConnector<TcpConnector>, HttpRequestBody>,
    /// Authorities (host and port) of services that give credentials.
    role_services: Arc<[String]>,
}

impl Http {
    /// `with_tls`: the store is reached over TLS, so that what TLS lacks is an error now.
    pub(super) fn new(environment: &dyn Fn(&str) -> Option<String>, with_tls: bool) -> Result<Self, String> {
        let tls = match tls(environment) {
            Ok(tls) => tls,
            Err(message) if with_tls => return Err(message),
            // Only services on this machine or its link are asked, over HTTP.
            Err(_) => ClientConfig::builder_with_provider(provider().into())
                .with_safe_default_protocol_versions()
                .map_err(|error| error.to_string())?
                .with_root_certificates(RootCertStore::empty())
                .with_no_client_auth(),
        };
        let mut tcp = TcpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_PATIENCE));
        tcp.set_keepalive(Some(Duration::from_secs(15)));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_CONNECTION_MAX)
            .build(connector);
        let named = ["AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_CONTAINER_CREDENTIALS_FULL_URI"];
        let named = named.into_iter().filter_map(environment).filter_map(|url| {
            let (_, rest) = url.split_once("://")?;
            Some(rest.split('/').next().unwrap_or_default().to_owned())
        });
        let role_services = ROLE_SERVICES.iter().map(|host| (*host).to_owned()).chain(named).collect();
        Ok(Self { client, role_services })
    }
}

impl HttpConnector for Http {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Http {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let authority = request.uri().authority().map(|authority| authority.as_str());
        let role_service =
            authority.filter(|authority| self.role_services.iter().any(|service| service == authority));
        Seen::note_request(role_service);
        let response = self.client.request(request).await.map_err(|error| {
            Seen::note_broken(failure::chain(&error), is_tls(&error));
            let kind = if error.is_connect() { HttpErrorKind::Connect } else { HttpErrorKind::Interrupted };
            HttpError::new(kind, error)
        })?;
        let (head, body) = response.into_parts();
        Seen::note_status(head.status.as_u16());
        let body =
            HttpResponseBody::new(body.map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error)));
        if head.status.is_success() {
            return Ok(HttpResponse::from_parts(head, body));
        }
        let text = if body.is_end_stream() {
            Default::default()
        } else {
            // What cannot be read is not missed: the status says enough.
            Limited::new(body, ERROR_BODY_BYTES_MAX)
                .collect()
                .await
                .map(|body| body.to_bytes())
                .unwrap_or_default()
        };
        let text = String::from_utf8_lossy(&text).into_owned();
        Seen::note_error_body(&text);
        Ok(HttpResponse::from_parts(head, text.into()))
    }
}

/// Whether the other side cannot be trusted or does not speak TLS: trying again changes nothing.
fn is_tls(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<rustls::Error>() {
            return true;
        }
        next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            // `source` of an I/O error skips what it wraps.
            Some(inside) => Some(inside),
            None => error.source(),
        };
    }
    false
}

fn tls(environment: &dyn Fn(&str) -> Option<String>) -> Result<ClientConfig, String> {
    check_cpu()?;
    let mut roots = RootCertStore::empty();
    match environment("AWS_CA_BUNDLE") {
        Some(path) => {
            let refuse = |error: &dyn std::fmt::Display| format!("AWS_CA_BUNDLE {path}: {error}");
            for certificate in CertificateDer::pem_file_iter(&path).map_err(|error| refuse(&error))? {
                let certificate = certificate.map_err(|error| refuse(&error))?;
                roots.add(certificate).map_err(|error| refuse(&error))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err(
            "no certificate authorities are known here, so no TLS; install the package ca-certificates or \
                    set AWS_CA_BUNDLE to a PEM file"
                .into(),
        );
    }
    let config = ClientConfig::builder_with_provider(provider().into())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

fn provider() -> rustls::crypto::CryptoProvider {
    rustls_graviola::default_provider()
}

/// Graviola panics on CPUs older than about 2014; say so before.
fn check_cpu() -> Result<(), String> {
    #[cfg(target_arch = "x86_64")]
    let fits = is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("pclmulqdq")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("adx")
        && is_x86_feature_detected!("avx2");
    #[cfg(target_arch = "aarch64")]
    let fits = std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("sha2")
        && std::arch::is_aarch64_feature_detected!("pmull")
        && std::arch::is_aarch64_feature_detected!("neon");
    if fits {
        return Ok(());
    }
    Err("this CPU lacks instructions that TLS needs here (on x86-64: AES, PCLMULQDQ, BMI1, BMI2, ADX, AVX2); use \
         another machine, or an http:// endpoint on a network that you trust"
        .into())
}
