// An answer of `/v1/chat/completions`, chunk by chunk.

const SILENCE_MS = 20000; // a server that is there says something every five seconds

// The server does not answer, or has ceased to.
export class Gone extends Error {}

// It answers, and will not do this.
export class Refused extends Error {}

async function refusal(response) {
  let message = `the server said ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // what is in between may answer in its own way
  }
  if (response.status === 401) message = "The key is not accepted any more. Reload the page.";
  const wait = response.headers.get("retry-after");
  return new Refused(wait ? `${message} Try again in ${wait} s.` : message);
}

function within(promise, milliseconds) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Gone("nothing came any more")), milliseconds);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

// Passes on failures of the connection as `Gone`; what was stopped on purpose stays an AbortError.
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Gone) throw error;
    throw new Gone(error.message);
  }
}

export async function* stream(body, signal) {
  const response = await reached(fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  }));
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reached(within(reader.read(), SILENCE_MS));
      if (done) throw new Gone("the answer broke off");
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue; // a comment: the server is alive
        const data = event.slice(6);
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refused(chunk.error.message);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
