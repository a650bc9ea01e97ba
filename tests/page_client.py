"""A client that sends the requests of app.py's page without a browser, so that many fit on one machine."""

import json
import urllib.request
import uuid

SETTINGS = {"temperature": 0.38, "saturation": 1, "across": 50, "down": 50, "reach": 20}


class PageClient:
    """One user. Requests that the page answers with an error message raise a RuntimeError with it."""

    def __init__(self, address):
        self.address, self.session = address, uuid.uuid4().hex
        config = json.loads(self._get("config"))
        self.components = {x["props"].get("label") or str(x["props"].get("value")): x for x in config["components"]}
        self.events = config["dependencies"]
        self.weights = self.components["Model"]["props"]["value"]

    def take(self, name, data, **headers):
        """Upload a photo and return the addresses of the three pictures, all gray until the network has run."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body = head + data + f"\r\n--{boundary}--\r\n".encode()
        headers["Content-Type"] = f"multipart/form-data; boundary={boundary}"
        (path,) = json.loads(self._get("gradio_api/upload", body, headers))
        self.taken = self._event("Drop, paste or choose a photo", "upload")
        output = self._run(self.taken, {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}})
        return self._addresses([*output[1], output[2]])

    def color(self, **settings):
        """Run the events that follow an upload and return the addresses of gray and colorized."""
        compute = self._after(self.taken)
        self._run(compute, None, self.weights)
        return self._addresses(self._adjust(self._after(compute), settings)[0])

    def change(self, component, event="input", **settings):
        """Trigger the event of a component and return the addresses of gray and colorized."""
        return self._addresses(self._adjust(self._event(component, event), settings)[0])

    def download(self, name="PNG", **settings):
        """Return the bytes of the file that a button creates."""
        (file,) = self._adjust(self._event(f"Save as {name}", "click"), settings)
        return self._get(file["url"])

    def _adjust(self, event, settings):
        return self._run(event, None, *{**SETTINGS, **settings}.values())

    def _after(self, event):
        return next(x for x in self.events if x["trigger_after"] == event["id"] and x["backend_fn"])

    def _event(self, component, kind):
        return next(x for x in self.events if [self.components[component]["id"], kind] in x["targets"])

    def _run(self, event, *inputs):
        request = {"data": inputs, "fn_index": event["id"], "session_hash": self.session}
        self._get("gradio_api/queue/join", json.dumps(request).encode(), {"Content-Type": "application/json"})
        address = f"{self.address}/gradio_api/queue/data?session_hash={self.session}"
        with urllib.request.urlopen(address, timeout=300) as stream:
            for line in stream:
                message = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(message["output"]["error"])
                    return message["output"]["data"]
        raise RuntimeError("no answer")

    def _get(self, address, body=None, headers=None):
        address = address if address.startswith("http") else f"{self.address}/{address}"
        request = urllib.request.Request(address, body, headers or {})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.read()

    @staticmethod
    def _addresses(pictures):
        return [x["url"] for x in pictures]
