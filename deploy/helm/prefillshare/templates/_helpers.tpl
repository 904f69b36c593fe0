{{- define "prefillshare.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "prefillshare.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "prefillshare.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "prefillshare.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "prefillshare.selectorLabels" -}}
app.kubernetes.io/name: {{ include "prefillshare.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "prefillshare.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "prefillshare.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "prefillshare.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default (printf "%s-gpu" .Chart.AppVersion)) }}
{{- end }}
{{- end }}

{{- define "prefillshare.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "prefillshare.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- define "prefillshare.httpPort" -}}
{{ dig "router" "http_port" 8000 .Values.deployment | int }}
{{- end }}

{{- define "prefillshare.grpcPort" -}}
{{ dig "router" "grpc_port" 9000 .Values.deployment | int }}
{{- end }}

{{- /* "true" for a group that routers run on: it offers what they take. Takes root, group. */ -}}
{{- define "prefillshare.hasRouters" -}}
{{- range $name, $_ := dig "router" "resources" dict .root.Values.deployment }}
{{- if hasKey $.group.rayResources $name }}true{{ end }}
{{- end }}
{{- end }}

{{- /* What every pod mounts. */ -}}
{{- define "prefillshare.volumes" -}}
{{- $root := .root }}
- name: models
  {{- if $root.Values.models.existingClaim }}
  persistentVolumeClaim: {claimName: {{ $root.Values.models.existingClaim }}, readOnly: true}
  {{- else if $root.Values.models.hostPath }}
  hostPath: {path: {{ $root.Values.models.hostPath }}, type: Directory}
  {{- else }}
  emptyDir: {sizeLimit: {{ $root.Values.models.downloadSize }}}
  {{- end }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ get .group "shmSize" | default "4Gi" }}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
{{- with $root.Values.auth.keysFile.secretName }}
- name: keys
  secret: {secretName: {{ . }}, items: [{key: {{ $root.Values.auth.keysFile.secretKey }}, path: keys.yaml}]}
{{- end }}
{{- with $root.Values.tls.secretName }}
- name: tls
  secret: {secretName: {{ . }}}
{{- end }}
{{- end }}

{{- define "prefillshare.volumeMounts" -}}
- {name: models, mountPath: {{ .Values.models.mountPath }}, readOnly: true}
- {name: shm, mountPath: /dev/shm}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/prefillshare}
{{- if .Values.auth.keysFile.secretName }}
- {name: keys, mountPath: /etc/prefillshare/keys, readOnly: true}
{{- end }}
{{- if .Values.tls.secretName }}
- {name: tls, mountPath: /etc/prefillshare/tls, readOnly: true}
{{- end }}
{{- end }}

{{- /* Models that are downloaded, a container each, one after the other. */ -}}
{{- define "prefillshare.downloads" -}}
{{- $root := . }}
{{- range $number, $one := .Values.models.download }}
- name: download-{{ $number }}
  image: {{ include "prefillshare.image" $root }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  securityContext: {{- toYaml $root.Values.securityContext | nindent 4 }}
  {{- if $one.repo }}
  command: [hf, download, {{ $one.repo | quote }}, --revision, {{ $one.revision | default "main" | quote }}, --local-dir, "{{ $root.Values.models.mountPath }}/{{ $one.folder }}"]
  {{- else }}
  command: [python, -c, "import os, sys; from pyarrow import fs; os.makedirs(sys.argv[2], exist_ok=True); fs.copy_files(sys.argv[1], sys.argv[2])", {{ $one.url | quote }}, "{{ $root.Values.models.mountPath }}/{{ $one.folder }}"]
  {{- end }}
  env:
    - {name: HOME, value: /home/prefillshare}
    {{- with $root.Values.models.downloadEnv }}{{ toYaml . | nindent 4 }}{{ end }}
    {{- with $root.Values.models.hubToken.secretName }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $root.Values.models.hubToken.secretKey }}}}
    {{- end }}
  volumeMounts:
    - {name: models, mountPath: {{ $root.Values.models.mountPath }}}
    - {name: tmp, mountPath: /tmp}
    - {name: home, mountPath: /home/prefillshare}
{{- end }}
{{- end }}

{{- /* A pod of the cluster. Takes root, group, name, head (bool). */ -}}
{{- define "prefillshare.pod" -}}
{{- $root := .root }}
{{- $group := .group }}
{{- $gpus := get $group "gpus" | default dict }}
{{- $rdma := get $group "rdma" | default dict }}
{{- $routers := include "prefillshare.hasRouters" . }}
metadata:
  labels:
    {{- include "prefillshare.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .name }}
    {{- if $routers }}
    prefillshare/router: "true"
    {{- end }}
    {{- with $group.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $group.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "prefillshare.serviceAccount" $root }}
  automountServiceAccountToken: {{ and .head $root.Values.autoscaling.enabled }}
  securityContext: {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with get $group "runtimeClassName" }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $group.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with get $group "topologySpreadConstraints" }}
  topologySpreadConstraints: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with get $group "priorityClassName" }}
  priorityClassName: {{ . }}
  {{- end }}
  # Longer than engines and routers take to finish their running turns (prefillshare/app.py).
  terminationGracePeriodSeconds: 120
  {{- with include "prefillshare.downloads" $root }}
  initContainers: {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" .head }}
      image: {{ include "prefillshare.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- $security := deepCopy $root.Values.securityContext }}
        {{- if $rdma.enabled }}
        {{- $_ := set $security "capabilities" (merge (dict "add" (list "IPC_LOCK")) (get $security "capabilities" | default dict)) }}
        {{- end }}
        {{- toYaml $security | nindent 8 }}
      ports:
        {{- if .head }}
        - {name: gcs, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        {{- end }}
        {{- if $routers }}
        - {name: grpc, containerPort: {{ include "prefillshare.grpcPort" $root }}}
        {{- end }}
        # "serve" is the name by which KubeRay finds Serve's proxy for its probes.
        - {name: serve, containerPort: {{ include "prefillshare.httpPort" $root }}}
        - {name: metrics, containerPort: 8080}
      env:
        - {name: HOME, value: /home/prefillshare}
        - {name: HF_HUB_OFFLINE, value: "1"}
        # Nobody is told what runs here.
        - {name: VLLM_NO_USAGE_STATS, value: "1"}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        # Block keys must agree between pods.
        - {name: PYTHONHASHSEED, value: "0"}
        # A proxy that has died is replaced after three of these checks (prefillshare/serve_http.py).
        - {name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S, value: "2"}
        {{- if $root.Values.tls.clientCaKey }}
        # Serve's proxies ask for client certificates (prefillshare/serve_http.py).
        - {name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, value: prefillshare.serve_http.ask_for_client_certificates}
        {{- end }}
        {{- with $root.Values.redis.password.secretName }}
        - name: {{ dig "router" "redis_password_env" "PREFILLSHARE_REDIS_PASSWORD" $root.Values.deployment }}
          valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $root.Values.redis.password.secretKey }}}}
        {{- end }}
        {{- with $group.env }}{{ toYaml . | nindent 8 }}{{ end }}
      {{- if $root.Values.tls.secretName }}
      # KubeRay's own probe uses plain HTTP. (This one takes no turn: the head has to be ready before it may start Serve.)
      readinessProbe:
        tcpSocket: {port: {{ ternary 6379 (include "prefillshare.httpPort" $root | int) .head }}}
        periodSeconds: 10
        failureThreshold: 12
      {{- end }}
      resources:
        requests:
          {{- toYaml (dig "resources" "requests" dict $group) | nindent 10 }}
        limits:
          {{- $limits := deepCopy (dig "resources" "limits" dict $group) }}
          {{- if $gpus.count }}{{- $_ := set $limits $gpus.resource $gpus.count }}{{ end }}
          {{- if $rdma.enabled }}{{- $_ := set $limits $rdma.resource $rdma.count }}{{ end }}
          {{- toYaml $limits | nindent 10 }}
      volumeMounts:
        {{- include "prefillshare.volumeMounts" $root | nindent 8 }}
        {{- with get $group "extraVolumeMounts" }}{{ toYaml . | nindent 8 }}{{ end }}
    {{- with get $group "extraContainers" }}{{ toYaml . | nindent 4 }}{{ end }}
  volumes:
    {{- include "prefillshare.volumes" (dict "root" $root "group" $group) | nindent 4 }}
    {{- with get $group "extraVolumes" }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end }}

{{- /* {"prefill": 1} as ray start wants it inside KubeRay's rayStartParams. */ -}}
{{- define "prefillshare.rayResources" -}}
{{- toJson . | replace "\"" "\\\"" | printf "\"%s\"" | squote }}
{{- end }}
